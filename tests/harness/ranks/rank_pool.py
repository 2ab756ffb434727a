"""Processes that are the ranks of many small models, one after the other (`rank_server`)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from harness.answers.greedy_runner import Rows
from mgpu.protocol.model.expert_facts import ExpertSplit

DEADLINE_S = 90.0
"""Of one model, kernels compiled."""

_ENDED = "a rank has ended"


@dataclass(frozen=True)
class Job:
    """A model, how ranks share it, and what its rows begin with."""

    model: str
    sizes: list[int]
    """Ranks of each stage."""
    prompt_ids: list[int]
    count: int
    dtype: str = "float32"
    split: ExpertSplit = "tensor"
    code: str = "auto"


class RankPool:
    """Ranks on devices. If one has ended, cannot go on or is late, all are replaced before the next model."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = devices
        self._threads = ThreadPoolExecutor(len(devices))
        self._ranks: list[subprocess.Popen[str]] = []
        self._is_ready = False
        self._start()  # while the first model is made

    def run(self, job: Job) -> tuple[Rows, list[str]]:
        """Return what the rows got and the notes of all ranks. AssertionError if a rank fails."""
        if not self._ranks:
            self._start()
        if not self._is_ready:
            assert self._read() == ["ready"] * len(self._ranks)
            self._is_ready = True
        fd = os.memfd_create("mgpu-test")  # GPUs cannot pin the memory of a file on a disk
        try:
            line = json.dumps(asdict(job) | {"shared": f"/proc/{os.getpid()}/fd/{fd}"})
            for rank in self._ranks:
                assert rank.stdin is not None
                print(line, file=rank.stdin, flush=True)
            answers = self._read()
        finally:
            os.close(fd)
        errors = [answer["error"] for answer in answers if "error" in answer]
        if any("CUDA error" in error or "CudaError" in error or error == _ENDED for error in errors):
            self.end()  # no later step of such a process would work
        assert not errors, "\n".join(errors)
        [found] = {json.dumps(answer["token_ids"]): answer for answer in answers if "token_ids" in answer}.values()
        graphs = all(answer["has_graphs"] for answer in answers)
        notes = [note for answer in answers for note in answer["notes"]]
        return Rows(found["token_ids"], torch.tensor(found["logprobs"]), graphs), notes

    def _start(self) -> None:
        for rank, device in enumerate(self._devices):
            command = [sys.executable, "-m", "harness.ranks.rank_server", str(rank), device]
            pipe = subprocess.PIPE
            self._ranks.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))

    def _read(self) -> list[Any]:
        """Wait for a line of each rank."""
        waiting = [self._threads.submit(rank.stdout.readline) for rank in self._ranks if rank.stdout is not None]
        try:
            lines = [each.result(DEADLINE_S) for each in waiting]
        except TimeoutError:
            self.end()  # also ends the threads' waits
            raise AssertionError(f"a rank did not answer within {DEADLINE_S:g} s") from None
        return [json.loads(line) if line else {"error": _ENDED} for line in lines]

    def end(self) -> None:
        """End all ranks; `run` starts new ones."""
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._ranks, self._is_ready = [], False
