"""Rates of many layer maps of two devices, one after the other in the same two processes: no server is started."""

import argparse
import faulthandler
import gc
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from queue import Empty

import torch

from bench.multi_gpu.laps import HANG_S, Rank, Settings, make_spec

CONTEXT, LAPS = 128, 20
_REHEARSED = 8, 2
"""The same for CPU workers."""
_END_S = 20.0
Rates = tuple[int, list[float]]
"""Layers of the first stage, and tokens per second in each repetition."""


def make_settings(arguments: argparse.Namespace, layers: int, count: int, fd: int) -> Settings:
    """Return what ranks are told of a map of ``count`` and the other layers."""
    asked = argparse.Namespace(
        shape="small" if arguments.rehearse else "8B",
        map=[count, layers - count],
        tp=False,
        transport="kernels",
        step_tokens=2048,
        quant="none",
        device="cpu" if arguments.rehearse else "cuda",
    )
    context, laps = _REHEARSED if arguments.rehearse else (CONTEXT, LAPS)
    return Settings(make_spec(asked, fd), [arguments.batch], context, 0, laps, 0, False)


def rates_of_maps(arguments: argparse.Namespace, layers: int, counts: list[int]) -> Iterator[Rates]:
    """Yield the rates of one map after the other."""
    fd = os.memfd_create("mgpu-bench")
    settings = [make_settings(arguments, layers, count, fd) for count in counts]
    os.ftruncate(fd, settings[0].spec.shared_bytes)
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", -1, lock=False)
    found: Queue[Rates] = context.Queue()
    more = f"/proc/{os.getpid()}/fd/{fd}", done, found, arguments.repeat
    ranks = [context.Process(target=_run_rank, args=(settings, counts, rank, *more)) for rank in range(2)]
    for each in ranks:
        each.start()
    try:
        for _ in counts:
            yield _next(found, ranks)
    finally:
        for each in ranks:
            each.kill()


def _next(found: "Queue[Rates]", ranks: Sequence[BaseProcess]) -> Rates:
    while True:
        try:
            return found.get(timeout=0.2)
        except Empty:
            if failed := [rank for rank, each in enumerate(ranks) if each.exitcode]:
                raise RuntimeError(f"ranks {failed} failed") from None


@torch.inference_mode()
def _run_rank(
    settings: list[Settings],
    counts: list[int],
    rank: int,
    parent_fd: str,
    done: "Synchronized[int]",
    found: "Queue[Rates]",
    repeat: int,
) -> None:
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    fd = os.open(parent_fd, os.O_RDWR)
    first, *_ = specs = [replace(each, spec=replace(each.spec, shared_fd=fd)) for each in settings]
    each = Rank(first, rank, done)
    for count, one in zip(counts, specs, strict=True):
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        (batch,) = one.rows
        if one is not first:
            unread = each.runner._pending  # tokens that are under way through channels, which stay
            each.runner.close()
            del each.runner
            gc.collect()
            torch.cuda.empty_cache()
            each.runner = each.load(one.spec, batch, is_compiled=True)
            each.runner._pending.extend(unread)
        context, laps = one.context, one.laps
        each.fill(batch, context)
        times = [each.decode(batch, context + laps * turn, laps) for turn in range(repeat + 1)][1:]
        if rank == 0:
            found.put((count, [batch / us * 1e6 for us in times]))
    faulthandler.dump_traceback_later(_END_S, exit=True)  # until the parent ends this process
