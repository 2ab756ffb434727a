"""Compile every kernel that mgpu launches for GPUs that are not here, and say what each takes.

    python -m bench.kernels.compiled [--gpus 80,89] [--models 8B] [--kernels group_gemm] [--save FOLDER]

Needs Triton and no GPU. Layers are built in the shapes and formats of `models.py`, with memory that is never touched,
and run at many numbers of rows; `sums.py` launches what passes between ranks. Launches are noted, not made, so what a
kernel is compiled for is what its launcher asks for on that GPU. A row has a kernel's largest shared memory, registers
and bytes of stack (spilled registers, mostly) over all ways in which it is launched there. The exit code is 1 if a
kernel does not compile or asks for more shared memory than a program may have.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TextIO

from bench.kernels.compiled.gpus import GPUS, Gpu, pretend
from bench.kernels.compiled.recorder import Compiled, Launch, Recorder, compile_all
from bench.options import numbers


def record(models: str) -> list[Launch]:
    from bench.kernels.compiled.models import CPU, MODELS, launch
    from bench.kernels.compiled.sums import launch_sums
    from mgpu.worker.kernels.runtime import has_float8

    recorder = Recorder()
    recorder.start()
    for model in MODELS:
        if models in model.name and (model.kept != "fp8" or has_float8(CPU)):  # plans refuse it elsewhere
            recorder.by = model.name
            launch(model)
    if not models:
        recorder.by = "sums over ranks"
        launch_sums()
    recorder.stop()
    return recorder.launches


def examine(gpu: Gpu, options: argparse.Namespace) -> int:
    """Print what all kernels take on a GPU; return how many of their launches would fail there."""
    pretend(gpu)
    launches = [each for each in record(options.models) if options.kernels in f"{each.file} {each.kernel.__name__}"]
    print(f"sm_{gpu.capability} ({gpu.names}): {len(launches)} kernels", flush=True)
    rows: dict[tuple[str, str], list[Compiled]] = defaultdict(list)
    failures = 0
    with _saved(gpu, options.save) as file:
        for launch, found in compile_all(launches, options.processes):
            rows[launch.file, launch.kernel.__name__].append(found)
            print(json.dumps(_line(launch, found)), file=file, flush=True)
            if found.error or found.shared_bytes > gpu.shared_bytes:
                failures += 1
                reason = found.error or found.shared_bytes
                print(f"  FAILS {launch.file} {launch.by}: {reason} {launch.constants}", flush=True)
    for (file_name, name), found in sorted(rows.items()):
        most = [max(getattr(each, part) for each in found) for part in ("shared_bytes", "registers", "stack_bytes")]
        sizes = f"{most[0] / 1024:6.1f} KiB, {most[1]:3} registers, {most[2]} B"
        print(f"  {file_name:36} {name:28} {len(found):4} ways, {sizes}")
    print(f"sm_{gpu.capability}: {failures} fail", flush=True)
    return failures


def _line(launch: Launch, found: Compiled) -> dict[str, object]:
    return {
        "kernel": launch.kernel.__name__, "file": launch.file, "by": launch.by, "shared": found.shared_bytes,
        "registers": found.registers, "stack": found.stack_bytes, "error": found.error, "constants": launch.constants,
    }  # fmt: skip


def _saved(gpu: Gpu, folder: Path | None) -> TextIO:
    """Open the file for a GPU's lines, so that what is compiled is kept if the rest is cut short."""
    if folder is None:
        return open(os.devnull, "w")
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"sm_{gpu.capability}.jsonl").open("w")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=numbers, default=list(GPUS), help=f"of {', '.join(map(str, GPUS))}")
    parser.add_argument("--models", default="", help="only those with this in their name")
    parser.add_argument("--kernels", default="", help="only those with this in their file or name")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--save", type=Path, help="folder for one line of JSON for each way to launch a kernel")
    options = parser.parse_args()
    if len(options.gpus) == 1:
        sys.exit(examine(GPUS[options.gpus[0]], options) > 0)
    codes = []
    for capability in options.gpus:  # what a process compiles for cannot be changed
        command = [sys.executable, "-m", "bench.kernels.compiled", *sys.argv[1:], "--gpus", str(capability)]
        codes.append(subprocess.run(command, check=False).returncode)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
