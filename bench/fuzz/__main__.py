"""Fuzz what reads hostile bytes, for as long as you like: `make fuzz MINUTES=10`.

Each target (`bench/fuzz/targets/`) is a function of bytes. atheris, a coverage-guided fuzzer, looks for inputs that
reach new code, begins with the corpus in `bench/fuzz/corpus/`, and goes on where the last run ended. A finding is an
exception that the target may not raise, too much time or memory, or the end of the process. It is saved in the folder
and fails the run, and every later run, until its file is removed. The test suite replays the corpus.

    python -m bench.fuzz [--minutes 1] [--only NAME,…] [--jobs 2] [--folder .fuzz] [--save FILE]
    python -m bench.fuzz --keep 2000                # add to each target's corpus, up to so many bytes
    python -m bench.fuzz --only NAME --replay FILE  # run one input, with its traceback
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench.fuzz import corpus
from bench.fuzz.target import examine
from bench.fuzz.targets import TARGETS
from bench.options import words
from bench.report import Table
from mgpu.launch.bench.report import describe, heading

COLUMNS = "target | CPU min | inputs | inputs/s | edges | corpus | findings | good"
MOST_KILLERS = 20
"""Inputs that end the process, in one run of one target."""
START_S = 60.0
"""What a worker may need beyond its CPU time before the first input, and on a busy machine many times that."""
_PROGRESS = re.compile(rb"cov: (\d+) ft: \d+ corp: (\d+)")


@dataclass
class Row:
    """What fuzzing one target came to."""

    target: str
    cpu_s: float = 0.0
    inputs: int = 0
    edges: int = 0
    corpus: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.findings

    @property
    def line(self) -> str:
        rate = self.inputs / self.cpu_s if self.cpu_s else 0.0
        return (
            f"| {self.target} | {self.cpu_s / 60:.1f} | {self.inputs:,} | {rate:,.0f} | {self.edges} | {self.corpus} | "
            f"{len(self.findings)} | {'yes' if self.is_good else 'NO'} |"
        )


def fuzz(name: str, folder: Path, cpu_s: float) -> Row:
    """Fuzz one target in processes of their own, until they have used ``cpu_s``."""
    row = Row(name)
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(MOST_KILLERS):
        status = _run_worker(name, folder, cpu_s - row.cpu_s, row)
        if status == 0 or row.cpu_s >= cpu_s - 1.0:
            break
        if not list(folder.glob("killer-*")):
            log = (folder / "log").read_bytes()[-500:].decode(errors="replace")
            row.findings.append(f"the process ended with status {status}: {log}")
            break
    row.findings += _findings_in(folder)
    return row


def _run_worker(name: str, folder: Path, cpu_s: float, row: Row) -> int:
    stats = folder / "stats.json"
    stats.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.fuzz.worker", name, str(folder), str(cpu_s)]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RUST_BACKTRACE": "0"})
        try:
            status = process.wait(START_S + 20 * cpu_s)
        except subprocess.TimeoutExpired:  # a busy machine; libFuzzer itself ends an input that hangs
            status = 0
        finally:
            process.kill()
            process.wait()
    found = json.loads(stats.read_text()) if stats.exists() else {"inputs": 0, "cpu_s": 0.0}
    row.inputs += found["inputs"]
    row.cpu_s += found["cpu_s"]
    if progress := _PROGRESS.findall((folder / "log").read_bytes()):
        row.edges, row.corpus = map(int, progress[-1])
    return status


def _findings_in(folder: Path) -> list[str]:
    found = [
        json.loads(file.read_text()) | {"file": str(file.with_suffix(""))} for file in folder.glob("finding-*.json")
    ]
    kinds = [f"{each['kind']}: {each['text'].strip().splitlines()[-1][:200]} ({each['file']})" for each in found]
    return kinds + [f"it ended or stopped the process ({file})" for file in sorted(folder.glob("killer-*"))]


def replay(name: str, file: Path) -> None:
    finding = examine(TARGETS[name], file.read_bytes())
    print("handled" if finding is None else f"{finding.kind}\n{finding.text}")
    if finding is not None:
        raise SystemExit(1)


def keep(names: list[str], folder: Path, most_bytes: int) -> None:
    for name in names:
        inputs = [file.read_bytes() for file in (folder / name / "inputs").glob("*")]
        handled = [data for data in inputs if len(data) <= most_bytes // 10 and examine(TARGETS[name], data) is None]
        print(f"{name}: {corpus.keep(name, handled, most_bytes)} more inputs")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="of CPU time, for each target")
    parser.add_argument("--only", type=words, default=list(TARGETS), metavar="NAME,…", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="targets at a time")
    parser.add_argument("--folder", type=Path, default=Path(".fuzz"), help="inputs and findings of all runs")
    parser.add_argument("--save", type=Path, help="file for the table")
    parser.add_argument("--keep", type=int, metavar="BYTES", help="fuzz nothing; add inputs to the corpus")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="fuzz nothing; run one input")
    options = parser.parse_args()
    if unknown := set(options.only) - set(TARGETS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return options


def main() -> None:
    options = parse()
    if options.replay:
        return replay(options.only[0], options.replay)
    if options.keep:
        return keep(options.only, options.folder, options.keep)
    facts = describe("atheris", "msgpack", "tokenizers", "jinja2")
    table: Table[Row] = Table(options.save or options.folder / time.strftime("fuzz-%Y%m%d-%H%M%S.json"), facts)
    table.say(f"{heading(facts)}\n\n| {COLUMNS} |")
    table.say("|" + " --- |" * (COLUMNS.count("|") + 1))
    lock = threading.Lock()

    def run(name: str) -> None:
        row = fuzz(name, options.folder / name, 60 * options.minutes)
        with lock:
            table.add(row)
            for finding in row.findings:
                table.say(f"    {finding}")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, options.only))
    if not table.is_good:
        raise SystemExit("fuzzing has found something")
    return None


if __name__ == "__main__":
    main()
