"""Say where the Triton kernels of `mgpu.worker.kernels` are used; everywhere else the same layers are plain torch."""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def uses_kernels(device: torch.device) -> bool:
    """Give True on a GPU with Triton. MGPU_KERNELS=0 in a worker's environment keeps all of them off."""
    if device.type != "cuda":
        return False
    if os.environ.get("MGPU_KERNELS", "1") == "0":
        log.warning("MGPU_KERNELS=0: %s runs on plain torch, several times slower", device)
        return False
    if importlib.util.find_spec("triton") is None:
        log.warning("triton is not installed: %s runs on plain torch, several times slower", device)
        return False
    return True


def aligned(x: Tensor) -> Tensor:
    """Give ``x`` at an address that is a multiple of 16: Triton compiles a kernel anew for any other."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
