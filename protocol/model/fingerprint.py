"""What tells two models apart without their weights."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelPrint:
    """The print of a model in some place; `protocol/checkpoint/fingerprint.py` takes it."""

    path: str
    config: str
    """Of the facts in config.json or the GGUF metadata."""
    tensors: str
    """Of names, types and shapes of all tensors, and of a few bytes of some; empty: there are no weights."""
