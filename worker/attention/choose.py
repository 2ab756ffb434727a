"""Choose the attention backend of a worker."""

import logging

import torch

from mgpu.worker.attention.interface import AttentionBackend, AttentionShape
from mgpu.worker.attention.plain_backend import PlainBackend
from mgpu.worker.kernels.use import uses_kernels

log = logging.getLogger(__name__)


def select_backend(device: torch.device, shape: AttentionShape) -> AttentionBackend:
    """Return the Triton kernels if they pass a check against plain torch, else plain torch."""
    if uses_kernels(device):
        from mgpu.worker.attention.check import attention_problem
        from mgpu.worker.attention.triton_backend import TritonBackend

        problem = attention_problem(device, shape)
        if problem is None:
            return TritonBackend()
        log.warning("attention runs on plain torch, many times slower: %s", problem)
    return PlainBackend()
