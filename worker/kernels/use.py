"""Decide where Triton kernels are used. Everywhere else the same layers run in plain torch."""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def uses_kernels(device: torch.device) -> bool:
    """Return True on a GPU with Triton, unless MGPU_KERNELS=0 is in the worker's environment."""
    if device.type != "cuda":
        return False
    if os.environ.get("MGPU_KERNELS", "1") == "0":
        log.warning("MGPU_KERNELS=0: %s runs on plain torch, several times slower", device)
        return False
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed: %s runs on plain torch, several times slower", device)
        return False
    return True


def may_round_to_float8() -> bool:
    """Return False with MGPU_FLOAT8_ROUNDING=0: then only float8 formats are multiplied in float8."""
    return os.environ.get("MGPU_FLOAT8_ROUNDING", "1") != "0"


def aligned(x: Tensor) -> Tensor:
    """Return ``x``, or a copy, at an address that is a multiple of 16: Triton compiles a kernel anew for any other."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
