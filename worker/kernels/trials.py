"""Try a product once on a device before layers rely on it: a compiler or a library may fail there, or be wrong."""

# T tokens, N output channels

from collections.abc import Callable

import torch
from torch import Tensor


def trial_problem(measure: Callable[[], float], tolerance: float) -> str:
    """Return what is wrong with products of which ``measure`` returns the relative error; empty if they may be used."""
    try:
        error = measure()
    except Exception as failure:  # private and experimental functions may fail in any way; other products still serve
        return f"they failed: {type(failure).__name__}: {failure}"
    return "" if error <= tolerance else f"they are off by {error:.1e} of their norm"


def relative_error(got_TN: Tensor, expected_TN: Tensor) -> float:
    """Return the distance, relative to the norm; infinity if it is not finite."""
    error = float((got_TN - expected_TN).norm() / expected_TN.norm())
    return error if error == error else torch.inf


def worst_row_error(got_TN: Tensor, expected_TN: Tensor) -> float:
    """Return the largest distance of a row, relative to its norm; infinity if it is not finite.

    Row by row, since large rows would hide small ones.
    """
    error = float(((got_TN - expected_TN).norm(dim=1) / expected_TN.norm(dim=1)).max())
    return error if error == error else torch.inf
