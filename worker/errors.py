"""What can go wrong in a worker, by name."""


class PeerLost(RuntimeError):
    """Another rank did not answer within the deadline, or reported that it failed."""


class BadPlan(ValueError):
    """A step plan contradicts the rows that this worker keeps: a bug of the orchestrator, never of a user."""


class OutOfMemory(RuntimeError):
    """Weights, activations or the KV pool do not fit; the text has the numbers and the way out."""
