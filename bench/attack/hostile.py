"""Many seeded random hostile sessions beside compared streams: ``python -m bench.attack.hostile --sessions 100000``.

Half of the sessions are on ipc, half on tcp with keys, where each of several hostile clients has a key of its own.
Processes of attackers run them interleaved. Those that wait for their answers are in a process of their own, with keys
of its own: an owner's floods hold up its own requests. Meanwhile honest clients stream greedy and sampled answers, and
every token is compared with those of an undisturbed run. The run fails when a stream is lost or different, when a
request of a hostile session that waited for it was never ended, when a restart is counted, or when memory or
descriptors do not come back.

    python -m bench.attack.hostile [--sessions 100000] [--seed 1] [--transports ipc,tcp] [--minutes 60] [--streams 8]
                                   [--width 16] [--processes 1] [--model demo] [--save FOLDER]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.attack.honest import Honest
from bench.attack.peers import Attacker
from bench.attack.row import GROWTH_BYTES, GROWTH_DESCRIPTORS
from bench.attack.sessions import Seen, is_patient, run_sessions
from bench.attack.victim import HOSTILE, Footprint, Transport, Victim, undisturbed
from bench.options import words
from bench.report import Table
from mgpu.launch.bench.report import describe, heading
from mgpu.protocol.internal.process.child import end_with_parent

NUM_KEYS, PATIENT_KEYS = 8, 2
COLUMNS = (
    "transport | sessions | min | sessions/s | actions | answers | honest answers | lost | different | never ended "
    "| worst first token, s | gateways | counted | MiB more | descriptors more | log B/s | good"
)


@dataclass
class Row:
    """What the sessions on one transport came to."""

    transport: str
    seed: int
    asked_sessions: int
    sessions: int = 0
    seconds: float = 0.0
    of_character: dict[str, int] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    honest_answers: int = 0
    lost: int = 0
    different: int = 0
    never_ended: int = 0
    worst_first_token_s: float = 0.0
    gateways: int = 0
    counted_restarts: int = 0
    grown_bytes: int = 0
    grown_descriptors: int = 0
    log_bytes_per_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        is_back = self.grown_bytes <= GROWTH_BYTES and self.grown_descriptors <= GROWTH_DESCRIPTORS
        bad = self.lost + self.different + self.never_ended + self.counted_restarts
        return is_back and not (bad or self.problems)

    @property
    def line(self) -> str:
        return (
            f"| {self.transport} | {self.sessions:,} of {self.asked_sessions:,} | {self.seconds / 60:.1f} | "
            f"{self.sessions / max(self.seconds, 1e-9):.0f} | {sum(self.actions.values()):,} | "
            f"{sum(self.answers.values()):,} | {self.honest_answers:,} | {self.lost} | {self.different} | "
            f"{self.never_ended} | {self.worst_first_token_s:.1f} | {self.gateways} | {self.counted_restarts} | "
            f"{self.grown_bytes / 2**20:.0f} | {self.grown_descriptors} | {self.log_bytes_per_s:.0f} | "
            f"{'yes' if self.is_good else 'NO'} |"
        )


def run(transport: Transport, sessions: int, options: argparse.Namespace) -> Row:
    """Start a server with honest streams, and run the sessions against it in processes of their own."""
    row = Row(transport, options.seed, sessions)
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = (set(cores[:-1]), {cores[-1]}) if len(cores) > 1 else (set(cores), set(cores))
    with Victim(options.model, transport, ours, hostile_keys=NUM_KEYS) as victim:
        expected = undisturbed(victim.client, options.streams)
        with Honest(victim.client, expected, options.streams) as honest:
            os.sched_setaffinity(0, ours)
            honest.watch(options.settle_s)
            held, began_s = victim.footprint(), time.monotonic()
            window = honest.begin()
            _attack(row, victim, sessions, options, theirs)
            row.seconds = time.monotonic() - began_s
            honest.end(window)
            honest.watch(options.settle_s)
            honest.wait_for_an_answer()
            row.honest_answers, row.lost, row.different = honest.finished, honest.lost, honest.different
        row.problems += window.problems[:5]
        row.worst_first_token_s = max(window.first_token_s, default=0.0)
        os.sched_setaffinity(0, set(cores))
        _look_back(row, victim, held)
    return row


def _attack(row: Row, victim: Victim, sessions: int, options: argparse.Namespace, cores: set[int]) -> None:
    files = [str(key) for at in range(NUM_KEYS) if (key := victim.key_file(f"{HOSTILE}{at}"))]
    seconds = 60 * options.minutes
    shape = [victim.endpoint, options.seed, sessions, options.processes, options.width, seconds]
    kinds = [*((number, files[PATIENT_KEYS:]) for number in range(options.processes)), (-1, files[:PATIENT_KEYS])]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.attack.hostile", "--worker", *map(str, (*shape, number, *keys))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=partial(_begin, cores),
        )
        for number, keys in kinds
    ]  # fmt: skip
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds + 600)
            if process.returncode:
                row.problems.append(f"an attacker failed: {errors.decode(errors='replace').strip()[-300:]}")
                continue
            found = json.loads(output)
            row.sessions += found["done"]
            row.never_ended += len(found["problems"])
            row.problems += found["problems"][:20]
            for name, counts in (("of_character", "sessions"), ("actions", "actions"), ("answers", "answers")):
                setattr(row, name, dict(Counter(getattr(row, name)) + Counter(found[counts])))
    except subprocess.TimeoutExpired:
        row.problems.append("an attacker did not end")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _begin(cores: set[int]) -> None:
    """Keep an attacker to its cores, and let it end with the program that started it."""
    os.sched_setaffinity(0, cores)
    end_with_parent(signal.SIGKILL)


def _look_back(row: Row, victim: Victim, held: Footprint) -> None:
    if not victim.lives:
        row.problems.append(f"the server has ended: {victim.log.read_text(errors='replace')[-400:]}")
        return
    after = victim.settled(held, GROWTH_BYTES, GROWTH_DESCRIPTORS)
    row.gateways, row.counted_restarts = victim.restarts()
    row.grown_bytes = max(0, after.rss_bytes - held.rss_bytes)
    row.grown_descriptors = max(0, after.descriptors - held.descriptors)
    row.log_bytes_per_s = (after.log_bytes - held.log_bytes) / row.seconds


def work(words: list[str]) -> None:
    """Be an attacking process: run every ``processes``-th session and print what was seen.

    A ``number`` below zero runs all sessions that wait for their answers, the other processes those that do not.
    """
    endpoint, seed, sessions, processes, width, seconds, number, *files = words
    waits = int(number) < 0
    keys = [Path(file) for file in files] or [None]
    attackers = [Attacker(endpoint, key, 1) for key in keys]
    seen = Seen()
    all_numbers = range(int(sessions)) if waits else range(int(number), int(sessions), int(processes))
    numbers = (each for each in all_numbers if is_patient(each, int(seed)) == waits)
    done = run_sessions(numbers, int(seed), attackers, int(width), time.monotonic() + float(seconds), seen)
    for attacker in attackers:
        attacker.close()
    print(json.dumps(vars(seen) | {"done": done}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=100_000, help="on all transports together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transports", type=words, default=["ipc", "tcp"])
    parser.add_argument("--minutes", type=float, default=60.0, help="for each transport; what is left then is not run")
    parser.add_argument("--streams", type=int, default=8, help="honest ones")
    parser.add_argument("--width", type=int, default=16, help="sessions at a time, in each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--save", type=Path, help="folder for hostile.json")
    options = parser.parse_args()
    options.settle_s = 5.0
    options.save = options.save or Path("bench/results") / time.strftime("hostile-%Y%m%d-%H%M%S")
    return options


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2:])
    options = parse()
    facts = describe("pyzmq", "msgpack")
    table: Table[Row] = Table(options.save / "hostile.json", facts)
    table.say(f"{heading(facts)} | {options.streams} streams, seed {options.seed}\n\n| {COLUMNS} |")
    table.say("|" + " --- |" * (COLUMNS.count("|") + 1))
    for transport in options.transports:
        row = run(transport, options.sessions // len(options.transports), options)
        table.add(row)
        for problem in row.problems:
            table.say(f"    {problem}")
    if not table.is_good:
        raise SystemExit("hostile sessions did more than they may")
    return None


if __name__ == "__main__":
    main()
