"""Time the all-reduce of the ranks of one stage, by backend and message size.

    python bench/all_reduce.py [--ranks 2,3,4] [--kib 8,64] [--backends shared-memory,gloo] [--device cpu]

Medians of rank 0 in microseconds, one thread per rank; on GPUs also inside a CUDA graph.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from all_reduce_rank import shared_bytes
from machine import describe, heading

from mgpu.orchestrator.devices import Machine, find_machine, worker_environment

PROGRAM = Path(__file__).with_name("all_reduce_rank.py")
DEADLINE_S = 180.0


@dataclass(frozen=True, slots=True)
class AllReduceTime:
    """How long a message of ``nbytes`` took."""

    nbytes: int
    eager_us: float
    graph_us: float | None

    @property
    def best_us(self) -> float:
        return self.eager_us if self.graph_us is None else self.graph_us


class RankFailed(Exception):
    """A rank ended badly, or never; the text is what it said."""


def time_all_reduce(
    machine: Machine, size: int, backend: str, lengths: Sequence[int], environ: Mapping[str, str] = os.environ
) -> list[AllReduceTime]:
    """Start one process per rank on the first ``size`` devices. RankFailed with the log of the first that fails."""
    fd = os.memfd_create("mgpu-bench")
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        try:
            os.ftruncate(fd, shared_bytes(size))
            for rank in range(size):
                added, device = worker_environment(machine, rank)
                command = [sys.executable, str(PROGRAM), backend, str(size), str(rank), str(fd), folder, device]
                with (Path(folder) / f"out{rank}").open("wb") as out, (Path(folder) / f"log{rank}").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [*command, ",".join(map(str, lengths))],
                            env={**environ, **added},
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=log,
                            pass_fds=[fd],
                        )
                    )
            _wait(processes, Path(folder))
            rows = json.loads((Path(folder) / "out0").read_text())
        finally:
            os.close(fd)
            for process in processes:
                process.kill()
                process.wait()
    return [AllReduceTime(nbytes, eager, graph) for nbytes, eager, graph in rows]


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", folder: Path) -> None:
    """Wait for every rank; the first failure ends the waiting, for its peers would wait for it in vain."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                text = (folder / f"log{rank}").read_text(errors="replace").strip()
                raise RankFailed(f"rank {rank}, status {status}: {(text.splitlines() or ['no word'])[-1]}\n{text}")
        if all(status == 0 for status in statuses):
            return
        if time.monotonic() > deadline_s:
            raise RankFailed(f"ranks {[r for r, s in enumerate(statuses) if s is None]} after {DEADLINE_S:g} s")
        time.sleep(0.02)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=numbers, default=[2, 3, 4])
    parser.add_argument("--kib", type=numbers, default=[8, 64, 1024])
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["shared-memory", "gloo"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    print(heading(describe()))
    for size in arguments.ranks:
        machine = find_machine(arguments.device, size if arguments.device == "cpu" else None)
        for backend in arguments.backends:
            for row in time_all_reduce(machine, size, backend, [kib << 10 for kib in arguments.kib]):
                graph = f", {row.graph_us:.1f} us in a graph" if row.graph_us is not None else ""
                print(f"{size} ranks, {row.nbytes >> 10} KiB, {backend}: {row.eager_us:.1f} us{graph}", flush=True)


if __name__ == "__main__":
    main()
