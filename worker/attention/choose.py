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
            return TritonBackend(_has_rule_kernels(device, shape), shape.expanded_bytes)
        log.warning("attention runs on plain torch, many times slower: %s", problem)
    return PlainBackend()


def _has_rule_kernels(device: torch.device, shape: AttentionShape) -> bool:
    """Return True if the stage has linear layers, and their kernels pass a check."""
    if shape.linear is None:
        return False
    from mgpu.worker.attention.rule_check import rule_problem

    if (problem := rule_problem(device, shape.linear, shape.dtype)) is None:
        return True
    log.warning("linear layers run on plain torch, many times slower and without CUDA graphs: %s", problem)
    return False
