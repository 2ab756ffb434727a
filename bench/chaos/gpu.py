"""Kill a worker and then the parent of a server on a GPU: time to recover, and whether the GPU's memory comes back.

    python -m bench.chaos.gpu [--model FOLDER] [--workers 2] [--streams 16] [--kills 3] [--cpu] [--save FOLDER]

Without ``--model``: Llama-3.1-8B in bfloat16 with random weights, two workers that share one GPU. In bfloat16 a prompt
pass rounds differently from single steps, so a stream may go on with other tokens than undisturbed; counted is what is
lost and repeated. ``--cpu`` rehearses the program with a small model of random weights and no GPU memory to look at.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.chaos.ends import kill_parent
from bench.chaos.kills import SILENCE_S
from bench.chaos.load import Standstill, Streams, make_jobs, undisturbed
from bench.chaos.server import Server, ServerOptions, shared_memory
from bench.chaos.table import Report, Row
from bench.model_shapes import LLAMA_8B
from bench.waiting import wait_until
from mgpu import Client
from mgpu.launch.bench.report import describe, heading
from mgpu.orchestrator.placement.machine.nvml import NvmlSession

TINY = {
    **LLAMA_8B,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 49152,
}
GPU_BACK_S = 10.0
NEARLY = 256 << 20
"""The driver may hold this much more or less for itself; weights and the pool are many GiB."""
MIB = 1 << 20

FreeBytes = Callable[[], int]


def free_gpu_bytes() -> int:
    """Ask the driver how much of all GPUs is free; 0 without any."""
    with NvmlSession() as session:
        return sum(gpu.free_bytes for gpu in session.inventory().gpus)


def kill_and_recover(server: Server, streams: Streams, count: int, held_bytes: Callable[[], int]) -> Row:
    """SIGKILL one rank after another under the streams; the seconds are those from the signal to the next `ready`.

    Workers allocate as their streams need it. What the GPU holds is therefore looked at when all streams have been
    answered once, and again after every kill: a leak is what grows from kill to kill.
    """
    row = Row("SIGKILL of a worker, decode")
    streams.wait_for_all()
    held = [held_bytes()]
    with Client(server.endpoint, silence_timeout_s=SILENCE_S) as client:
        for rank in range(count):
            streams.wait_for_pieces(100)
            restarts = client.health().restarts
            workers = server.workers()
            began_s = time.monotonic()
            workers[rank % len(workers)].kill()
            recovery_s = server.wait_for_restarts(restarts + 1, client)
            row.injected(time.monotonic() - began_s)
            row.notes.append(f"kill {rank + 1}: the server says {recovery_s:.2f} s from noticing to ready")
            streams.wait_for_all()
            held.append(held_bytes())
    changes = [late - early for early, late in itertools.pairwise(held)]
    row.notes.append(f"GPU memory held: {held[0] / MIB:.0f} MiB under load, {mib(changes)} MiB with each kill")
    row.problems += leak(changes)
    return row


def leak(changes: Sequence[int]) -> list[str]:
    """Say by how much the memory grew if it did with every kill, and by more than the driver may take for itself."""
    if not changes or min(changes) <= 0 or sum(changes) <= NEARLY:
        return []
    return [f"more GPU memory is held after every kill: {mib(changes)} MiB"]


def mib(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number / MIB:+.0f}" for number in numbers)


def kill_the_parent(server: Server, free_bytes: FreeBytes, free_before: int) -> Row:
    """SIGKILL the parent; the memory of the GPU must be what it was before the server."""
    row = Row("SIGKILL of the parent")
    used = free_before - free_bytes()
    began_s = time.monotonic()
    kill_parent(server, row, shared_memory())
    if not wait_until(lambda: free_bytes() >= free_before - NEARLY, GPU_BACK_S):
        row.problems.append(f"{(free_before - free_bytes()) / MIB:.0f} MiB of the GPU are still held")
    row.notes.append(
        f"the server held {used / MIB:.0f} MiB of the GPU; {(free_before - free_bytes()) / MIB:.0f} MiB were held "
        f"{time.monotonic() - began_s:.2f} s after the signal"
    )
    return row


def run(server_options: ServerOptions, options: argparse.Namespace, free_bytes: FreeBytes) -> list[Row]:
    free_before = free_bytes()
    with Server(server_options) as server:
        expected = undisturbed(server.endpoint, make_jobs(options.streams + 8, 200))
        with Streams(server.endpoint, expected, options.streams) as streams:
            kills = kill_and_recover(server, streams, options.kills, lambda: free_before - free_bytes())
        kills.add(streams.tally)
        if not options.cpu:  # bfloat16: other tokens are no error, missing ones are
            kills.notes.append(f"{kills.different} of {kills.finished} streams went on with other tokens (bfloat16)")
            kills.problems = [each for each in kills.problems if "as expected" not in each]
            kills.different = 0
        return [kills, kill_the_parent(server, free_bytes, free_before)]


def server_options_of(options: argparse.Namespace, folder: Path) -> ServerOptions:
    (folder / "config.json").write_text(json.dumps(TINY if options.cpu else LLAMA_8B))
    where = ("--device", "cpu", "--dtype", "float32") if options.cpu else ("--oversubscribe",)
    load = () if options.model else ("--load-format", "dummy")
    return ServerOptions(
        options.model or str(folder), options.workers, 30.0, "8GiB", (*where, *load, "--max-seq-len", "2048")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--save", type=Path, default=Path("bench/results/chaos-gpu"))
    options = parser.parse_args()
    free_bytes: FreeBytes = (lambda: 0) if options.cpu else free_gpu_bytes
    if not options.cpu and not free_bytes():
        raise SystemExit("no GPU; --cpu rehearses without one")
    facts = describe("triton", "pyzmq")
    report = Report(options.save, facts, heading(facts))
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in run(server_options_of(options, Path(folder)), options, free_bytes):
                report.add(row)
        except Standstill as error:
            raise SystemExit(str(error)) from None
    report.close()
    if not report.is_good:
        raise SystemExit("something was lost, repeated, changed or left behind")


if __name__ == "__main__":
    main()
