"""Errors of a worker."""


class PeerLost(RuntimeError):
    """Another rank did not answer within the deadline, or reported that it failed."""


class CaptureHung(PeerLost):
    """A sum of NCCL in a CUDA graph did not end."""


class BadPlan(ValueError):
    """A step plan contradicts the rows of this worker: a bug of mgpu, never a mistake of a user."""


class OutOfMemory(RuntimeError):
    """Weights, activations or the KV pool do not fit; the text has the numbers and the way out."""
