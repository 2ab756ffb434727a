"""Measure everything that the performance page shows, part by part, and write the page's table and picture.

    python -m bench.performance                              # all parts, on one GPU
    python -m bench.performance --only bf16,fp8 --budget 570 # some of them; nothing is begun that would take longer
    python -m bench.performance --only bf16 --again          # once more: the table shows the median of all times
    python -m bench.performance --write                      # table and picture from what was saved, nothing measured
    python -m bench.performance --rehearse                   # every part with small models and no GPU

Each part saves its rows as they come, in bench/results/performance, so that parts can be measured in several calls and
on several days. What stands after ``--`` goes to every ``mgpu-launch serve``; the table says so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from bench.model_shapes import write_config
from bench.options import Sizes, size_text
from bench.performance.ready import measure_ready
from bench.performance.records import next_path, read_results, record_paths
from bench.performance.rows import BENCH, FAILED, REAL, REHEARSED, SHOWN, last_line, missing
from bench.performance.server import Part, Place, measure
from bench.performance.table import BEGIN, END, table, write_between
from bench.performance.throughput_plot import write_picture
from mgpu.launch.bench.report import Report, gpu_names
from mgpu.orchestrator.errors import UserError

ROOT = Path(__file__).parents[2]
PEER_S = 400.0
"""Longest time that a peer may take for its part."""
UNFINISHED = "unfinished"
"""Folder, in that of the results, of parts that are being measured or were interrupted."""

SHORT: Sizes = ((1, 128), (8, 128), (64, 128), (256, 128))
LONG: Sizes = ((1, 1024), (8, 1024), (64, 1024), (256, 1024))
CURVE: Sizes = ((1, 1024), (4, 1024), (8, 1024), (16, 1024), (64, 1024), (256, 1024))
PROMPTS: Sizes = ((32, 1024), (4, 8192))
SERVERS = {
    "bf16": Part(
        "8B", (*SHORT, *CURVE), prefill=PROMPTS, bursts=((256, 1024),), first_token=128, idles=True,
        late_decode=((1, 8000), (8, 8000), (64, 8000)),
    ),
    "fp8": Part("8B", ((1, 128), *CURVE), ("--quant", "fp8"), prefill=((32, 1024),)),
    "fp8-kv": Part("8B", LONG, ("--quant", "fp8", "--kv-cache-dtype", "fp8")),
    "int8": Part("8B", SHORT[:2], ("--quant", "8")),
    "int4": Part("8B", SHORT[:2], ("--quant", "4")),
    "32b": Part("32B", ((1, 1024), (64, 1024))),
}  # fmt: skip
EXPECTED_S = {
    "bf16": 130, "fp8": 45, "fp8-kv": 35, "int8": 25, "int4": 25, "32b": 40, "ready": 100, "gaps": 30,
    "transformers": 75, "transformers-continuous": 200, "transformers-32b": 45,
}  # fmt: skip
"""Seconds per part on one H200 with compiled kernels."""
PEERS: Mapping[str, tuple[str, ...]] = {
    "transformers": (
        "hf_performance", "--decode", size_text(SHORT + LONG), "--prefill", size_text(PROMPTS),
        "--first-token", "1x128",
    ),
    "transformers-continuous": (
        "hf_continuous_performance", "--first-token", "1x128", "--decode", size_text(SHORT + LONG),
        "--burst", "256x1024",
    ),
    "transformers-32b": ("hf_performance", "--shape", "32B", "--decode", "1x1024,64x1024"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One call of this program."""

    place: Place
    results: Path

    def parts(self) -> dict[str, Callable[[Path], None]]:
        """Return, by part, the function that measures it and saves its rows in a file."""
        return {
            **{name: partial(self.server, part) for name, part in SERVERS.items()},
            "ready": lambda save: measure_ready(self.place, "8B", save),
            "gaps": self.gaps,
            **{name: partial(self.peer, command) for name, command in PEERS.items()},
        }

    def server(self, part: Part, save: Path) -> None:
        model = write_config(self.place.folder / part.shape, self.place.effort.config(part.shape))
        measure(part, self.place, model, save)

    def gaps(self, save: Path) -> None:
        """Profile one worker's steps. UserError in a rehearsal: there is no GPU to profile."""
        if self.place.effort.is_rehearsal:
            raise UserError("kernels are profiled on a GPU only")
        run_script(["step.py", "--rows", "1,64", "--context", "128", "--top", "8", "--save", str(save)])

    def peer(self, command: tuple[str, ...], save: Path) -> None:
        where = ("--device", "cpu", "--rehearse") if self.place.effort.is_rehearsal else ("--device", "cuda")
        run_script([f"peers/{command[0]}", *command[1:], *where, "--save", str(save)])

    def measure(self, name: str, again: bool) -> None:
        """Measure one part; ``again`` keeps what is saved of it. A failure becomes the last row.

        Rows are saved as they come, beside the records; only a part that has come to its end becomes one.
        """
        save = self.results / UNFINISHED / f"{name}.json"
        save.parent.mkdir(parents=True, exist_ok=True)
        save.unlink(missing_ok=True)
        try:
            self.parts()[name](save)
        except (UserError, click.ClickException) as error:
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
            note_failure(name, save, text)
        if not again:
            for path in record_paths(self.results, name):
                path.unlink()
        save.replace(next_path(self.results, name))


def note_failure(name: str, save: Path, text: str) -> None:
    """Add a failure to the rows that a part saved before it."""
    failure = missing(FAILED, 0, 0, text)
    if not save.exists():
        Report(BENCH, name, SHOWN, save).add(failure)
        return
    result = json.loads(save.read_text())
    result["rows"].append(failure)
    save.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{FAILED}: {text}", flush=True)


def run_script(words: list[str]) -> None:
    """Run another script of this folder. UserError when it fails or takes too long; its rows are what it saved."""
    script = words[0]
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.peers.{script}", *words[1:]], cwd=ROOT,
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=PEER_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{script} was not done in {PEER_S:g} s") from error
    if done.returncode:
        raise UserError(f"{script} ended with status {done.returncode}: {last_line(done.stderr)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    seconds = ", ".join(f"{name} ({expected} s)" for name, expected in EXPECTED_S.items())
    parser.add_argument("--only", default=",".join(EXPECTED_S), metavar="PART,…", help=f"of {seconds}")
    parser.add_argument("--skip", default="", metavar="PART,…", help="all parts but these")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds that all parts may take together")
    parser.add_argument("--tbps", type=float, default=4.3, help="what the GPU reads, in TB/s, for shares of the limit")
    parser.add_argument("--results", type=Path, help="folder of the rows (default: bench/results/performance)")
    parser.add_argument(
        "--again", action="store_true", help="keep what is saved: the table shows the median of all times"
    )
    parser.add_argument("--write", action="store_true", help="measure nothing; write table and picture")
    parser.add_argument("--rehearse", action="store_true", help="small models on the CPU; all files in another folder")
    parser.add_argument("options", nargs="*", help="options of every server, after --")
    arguments = parser.parse_args()
    arguments.parts = [part for part in arguments.only.split(",") if part and part not in arguments.skip.split(",")]
    if unknown := set(arguments.parts) - set(EXPECTED_S):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(EXPECTED_S)}")
    arguments.results = arguments.results or ROOT / "bench" / "results" / ("rehearsal" if arguments.rehearse else BENCH)
    return arguments


def measure_parts(arguments: argparse.Namespace) -> None:
    """Measure the parts that were asked for, one after the other, as long as there is time."""
    began_s = time.monotonic()
    effort = REHEARSED if arguments.rehearse else REAL
    if not (arguments.rehearse or gpu_names()):
        raise SystemExit("error: no GPU here, and these models take hours without one; --rehearse runs small ones")
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        run = Run(Place(effort, f"{arguments.tbps}TB/s", tuple(arguments.options), Path(folder)), arguments.results)
        for name in arguments.parts:
            left_s = arguments.budget - (time.monotonic() - began_s)
            if left_s < EXPECTED_S[name]:
                print(f"{name}: left out, it takes about {EXPECTED_S[name]} s and {left_s:.0f} are left", flush=True)
                continue
            part_s = time.monotonic()
            print(f"== {name}, about {EXPECTED_S[name]} s", flush=True)
            run.measure(name, arguments.again)
            print(f"== {name} took {time.monotonic() - part_s:.0f} s", flush=True)


def write(arguments: argparse.Namespace) -> None:
    """Write what was saved into docs and README; a rehearsal has its own, beside its results."""
    results, root = read_results(arguments.results), ROOT
    if arguments.rehearse:
        root = arguments.results
        (root / "docs").mkdir(exist_ok=True)
        for page in ("README.md", "docs/performance.md"):
            (root / page).write_text(
                f"A rehearsal with small models on a CPU: the numbers mean nothing.\n\n{BEGIN}\n{END}\n"
            )
    write_between(root / "docs" / "performance.md", table(results))
    write_picture(results, root / "docs" / "throughput.svg", root / "README.md")


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # servers end with the blocks they are in
    if arguments.write:
        write(arguments)
        return
    try:
        measure_parts(arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # who read the screen has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
