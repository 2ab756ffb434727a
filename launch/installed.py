"""What an installation lacks. `pip install mgpu` brings the clients; serving needs the packages of ``mgpu[serve]``."""

import importlib.util
from collections.abc import Sequence

from mgpu.orchestrator.errors import UserError

PLANNING = ("psutil", "pynvml")
SERVING = (*PLANNING, "torch", "tokenizers", "jinja2")
WAY_OUT = "pip install 'mgpu[serve]' (in a checkout: pip install -e '.[serve]')"


class NotInstalled(UserError):
    """A command needs packages that a client does without."""

    def __init__(self, command: str, missing: Sequence[str]) -> None:
        are = "is" if len(missing) == 1 else "are"
        super().__init__(
            f"this installation of mgpu has the client only, and `{command}` needs more: {', '.join(missing)} {are} "
            f"missing. Type: {WAY_OUT}"
        )


def missing(modules: Sequence[str]) -> list[str]:
    """Return those of ``modules`` that cannot be imported."""
    return [module for module in modules if importlib.util.find_spec(module) is None]
