"""Mistakes of the user, or of the machine, that end a command with one message and no traceback."""


class UserError(Exception):
    """Something that the user can change; the text has the numbers and what to type instead.

    ``exit_code`` is the status of the command: 78 (EX_CONFIG) unless a subclass says otherwise.
    """

    exit_code = 78


class DeviceError(UserError):
    """The visible devices are not what the user named, or cannot be queried."""


class NoDeviceError(DeviceError):
    """No GPU is there; one may come, when its driver is loaded. EX_UNAVAILABLE."""

    exit_code = 69


class PlacementError(UserError):
    """The model cannot be placed on these devices as asked."""


class ModelError(UserError):
    """The model cannot be found, obtained or read."""


class HubUnreachable(ModelError):
    """The hub did not answer, and the local cache lacks the model. It may answer later. EX_TEMPFAIL."""

    exit_code = 75
