"""Time the all-reduce of the ranks of one stage, by backend and message size.

    python -m bench.all_reduce [--ranks 2,3,4] [--kib 8,64] [--backends shared-memory,gloo] [--device cpu]
    python -m bench.all_reduce --ranks 2 --device cuda       # NCCL and own kernels, 8 KiB to 8 MiB
    python -m bench.all_reduce --ranks 2 --device cuda --backends one-shot,one-shot@8,one-shot@4   # with so many warps

Medians of rank 0 in microseconds, one thread per rank; on GPUs inside a CUDA graph.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.all_reduce.rank import BACKENDS, shared_bytes
from bench.options import numbers, words
from bench.waiting import wait_until
from mgpu.launch.bench.report import describe, heading
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine, worker_environment

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
    machine: Machine, size: int, backends: Sequence[str], lengths: Sequence[int]
) -> dict[str, list[AllReduceTime]]:
    """Start one process per rank on the first ``size`` devices, for backends of one transport.

    RankFailed with the log of the first that fails.
    """
    fd = os.memfd_create("mgpu-bench")
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        try:
            os.ftruncate(fd, shared_bytes(size))
            for rank in range(size):
                added, device = worker_environment(machine, rank)
                command = [
                    sys.executable,
                    "-m",
                    "bench.all_reduce.rank",
                    ",".join(backends),
                    str(size),
                    str(rank),
                    str(fd),
                    folder,
                    device,
                ]
                with (Path(folder) / f"out{rank}").open("wb") as out, (Path(folder) / f"log{rank}").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [*command, ",".join(map(str, lengths))],
                            env={**os.environ, **added},
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=log,
                            pass_fds=[fd],
                        )
                    )
            _wait(processes, Path(folder))
            found = json.loads((Path(folder) / "out0").read_text())
        finally:
            os.close(fd)
            for process in processes:
                process.kill()
                process.wait()
    return {name: [AllReduceTime(*row) for row in rows] for name, rows in found.items()}


def by_transport(names: Sequence[str]) -> list[list[str]]:
    """Put backends together that one start of the ranks can measure."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(BACKENDS[name.partition("@")[0]].transport, []).append(name)
    return list(groups.values())


def _wait(processes: "Sequence[subprocess.Popen[bytes]]", folder: Path) -> None:
    """Wait for every rank. The first failure ends the wait: the other ranks would wait for that peer in vain."""

    def all_ended() -> bool:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                text = (folder / f"log{rank}").read_text(errors="replace").strip()
                raise RankFailed(f"rank {rank}, status {status}: {(text.splitlines() or ['no word'])[-1]}\n{text}")
        return None not in statuses

    if not wait_until(all_ended, DEADLINE_S):
        running = [rank for rank, process in enumerate(processes) if process.poll() is None]
        raise RankFailed(f"ranks {running} after {DEADLINE_S:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=numbers, default=[2, 3, 4])
    parser.add_argument("--kib", type=numbers)
    parser.add_argument("--backends", type=words)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    nccl = [name for name, backend in BACKENDS.items() if backend.transport == "nccl"]
    arguments.backends = arguments.backends or (nccl if on_gpu else ["shared-memory", "gloo"])
    arguments.kib = arguments.kib or ([8 << shift for shift in range(11)] if on_gpu else [8, 64, 1024])
    print(heading(describe()))
    for size in arguments.ranks:
        machine = find_machine(arguments.device, size if arguments.device == "cpu" else None)
        for names in by_transport(arguments.backends):
            show(size, time_all_reduce(machine, size, names, [kib << 10 for kib in arguments.kib]))


def show(size: int, found: Mapping[str, Sequence[AllReduceTime]]) -> None:
    """Print one line per message size: microseconds of a call in a CUDA graph, where there is one, else of a call."""
    print(f"{size} ranks   KiB  " + "  ".join(found))
    for rows in zip(*found.values(), strict=True):
        times = (f"{row.best_us:{len(name)}.1f}" for name, row in zip(found, rows, strict=True))
        print(f"{rows[0].nbytes >> 10:13}  " + "  ".join(times), flush=True)


if __name__ == "__main__":
    main()
