"""Measure how fast weights get from files into memory, or onto a GPU.

    python -m bench.loading [--shape 8B] [--device cuda] [--folder DIR] [--quant none] [--tp 1] [--repeat 5]

Writes random bfloat16 weights of the shape into a folder unless they are there, then loads them as a worker does.
``cold`` asks the kernel to forget the files first, which it may refuse; ``warm`` reads what the page cache has. A plain
copy of memory beside it says what this machine could give. ``taskset -c 0-3`` before it gives fewer cores to read with.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.model_shapes import SHAPES, write_weights
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.bench.shapes import SMOLLM2_135M
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.models.build import build_stage, load_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank

ALL_SHAPES = {**SHAPES, "135M": SMOLLM2_135M}
COPY_BYTES = 1 << 28


def load_s(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, quant: Quant, rank: RankPlace) -> float:
    """Return the seconds from files to weights that can be used, without allocating them."""
    facts = checkpoint.facts
    group = MeasurableGroup(SingleRank())
    group.rank, group.size = rank.tp_rank, rank.tp_size
    stage = build_stage(facts, rank, range(facts.num_layers), group, dtype, device, quant)
    wait_for(device)
    began_s = time.perf_counter()
    load_weights(stage, checkpoint, lambda count: None)
    wait_for(device)
    return time.perf_counter() - began_s


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files from its page cache."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_gbps() -> float:
    """Return the GB/s that one thread copies from memory to memory."""
    source, dest = torch.ones(COPY_BYTES, dtype=torch.uint8).numpy(), torch.ones(COPY_BYTES, dtype=torch.uint8).numpy()
    times = []
    for _ in range(3):
        began_s = time.perf_counter()
        memoryview(dest)[:] = memoryview(source)
        times.append(time.perf_counter() - began_s)
    return COPY_BYTES / min(times) / 1e9


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(folder)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    rank = RankPlace(0, 0, 0, arguments.tp, 0)
    total = sum(entry.nbytes for entry in checkpoint.tensors.values())
    for name, repeat in (("cold", 1), ("warm", arguments.repeat)):
        if name == "cold":
            forget(folder)
        times = [load_s(checkpoint, device, dtype, arguments.quant, rank) for _ in range(repeat)]
        middle = statistics.median(times)
        print(f"{name}: {total / 1e9:.2f} GB of files in {middle:.2f} s, {total / middle / 1e9:.1f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(ALL_SHAPES), default="135M")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quant", choices=("none", "8", "fp8", "4"), default="none")
    parser.add_argument("--tp", type=int, default=1, help="load rank 0 of so many")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    print(heading(describe("torch")))
    print(f"one thread copies {copy_gbps():.1f} GB/s")
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.safetensors")):
            write_weights(folder, {**ALL_SHAPES[arguments.shape], "torch_dtype": "bfloat16"})
        measure(folder, arguments)


if __name__ == "__main__":
    main()
