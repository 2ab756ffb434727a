"""Attack a real server beside honest streams, and count what those lose: `make attack`.

For each attack one server, 16 compared streams and a prober: they are watched alone, then during the attack, then
after it. Ratios compare the attack with the same run before it. Where there are two cores or more the attacker has the
last one to itself, in all of the run.

    python -m bench.attack [--only NAME,…] [--transports ipc,tcp] [--seconds 60] [--strengths 1,4] [--streams 16]
                           [--model demo] [--save FOLDER]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.attack.attacks import ATTACKS, situation_of
from bench.attack.honest import Honest, Window
from bench.attack.victim import HOSTILE, Footprint, Transport, Victim, undisturbed
from bench.options import numbers, words
from bench.report import Table
from mgpu.launch.bench.report import describe, heading

GROWTH_BYTES = 96 << 20
"""Memory that a process may keep after an attack: allocators keep some of what they were given."""
LOG_BYTES_PER_S = 1000
MOST_FIRST_TOKEN, LEAST_RATE = 3.0, 0.6
"""Bounds of the ratios: median first token, tokens per second."""
COLUMNS = (
    "attack | transport | x | attacker: CPU s, MB, connections | first token, median (worst) | tokens/s "
    "| gateways | counted | lost | different | log B/s | MiB more | descriptors more | good"
)


@dataclass
class Row:
    """What one attack did."""

    attack: str
    transport: str
    strength: int
    cost: dict[str, float] = field(default_factory=dict)
    first_token_ratio: float = 0.0
    worst_first_token_ratio: float = 0.0
    rate_ratio: float = 0.0
    gateways: int = 0
    """Replaced meanwhile."""
    counted_restarts: int = 0
    """Restarts that `--max-restarts` counts."""
    lost: int = 0
    different: int = 0
    log_bytes_per_s: float = 0.0
    grown_bytes: int = 0
    grown_descriptors: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems

    def judge(self) -> None:
        """Turn every broken bound into a problem."""
        for name, value, most in (
            ("first token", self.first_token_ratio, MOST_FIRST_TOKEN),
            ("counted restarts", self.counted_restarts, 0),
            ("lost streams", self.lost, 0),
            ("different streams", self.different, 0),
            ("log, bytes per second", self.log_bytes_per_s, LOG_BYTES_PER_S),
            ("bytes kept", self.grown_bytes, GROWTH_BYTES),
            ("descriptors kept", self.grown_descriptors, 0),
        ):
            if value > most:
                self.problems.append(f"{name}: {value:.3g}, at most {most:g}")
        if self.rate_ratio < LEAST_RATE:
            self.problems.append(f"tokens per second: x {self.rate_ratio:.2f}, at least {LEAST_RATE}")

    @property
    def line(self) -> str:
        cost = self.cost
        spent = f"{cost.get('cpu_s', 0):.1f}, {cost.get('nbytes', 0) / 1e6:.1f}, {cost.get('connections', 0)}"
        return (
            f"| {self.attack} | {self.transport} | {self.strength} | {spent} | x {self.first_token_ratio:.1f} "
            f"({self.worst_first_token_ratio:.1f}) | x {self.rate_ratio:.2f} | {self.gateways} | "
            f"{self.counted_restarts} | {self.lost} | {self.different} | {self.log_bytes_per_s:.0f} | "
            f"{self.grown_bytes / 2**20:.0f} | {self.grown_descriptors} | {'yes' if self.is_good else 'NO'} |"
        )


def run_attack(name: str, transport: Transport, strength: int, options: argparse.Namespace) -> Row:
    """Start a server, watch honest clients without and with the attack, and see what it leaves behind."""
    row = Row(name, transport, strength)
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = (set(cores[:-1]), cores[-1]) if len(cores) > 1 else (set(cores), -1)
    with Victim(options.model, transport, ours, situation=situation_of(name)) as victim:
        expected = undisturbed(victim, options.streams)
        with Honest(victim, expected, options.streams) as honest:
            os.sched_setaffinity(0, ours)
            honest.watch(2.0)
            before = honest.watch(max(5.0, options.seconds / 4))
            held = victim.footprint()
            during = _attacked(row, victim, honest, options.seconds, theirs)
            honest.watch(1.0)
            row.lost, row.different = honest.lost, honest.different
        os.sched_setaffinity(0, set(cores))
        _compare(row, victim, before, during, held, options.seconds)
    row.judge()
    return row


def _attacked(row: Row, victim: Victim, honest: Honest, seconds: float, core: int) -> Window:
    key = victim.key_file(f"{HOSTILE}0")
    words = [row.attack, victim.endpoint, str(seconds), str(row.strength), str(core), *([str(key)] if key else [])]
    attacker = subprocess.Popen(
        [sys.executable, "-m", "bench.attack.attacker", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        window = honest.watch(seconds)
        output, errors = attacker.communicate(timeout=60)
        if attacker.returncode:
            row.problems.append(f"the attacker failed: {errors.decode(errors='replace').strip()[-300:]}")
        else:
            row.cost = json.loads(output)
    except subprocess.TimeoutExpired:
        row.problems.append("the attacker did not end")
    finally:
        attacker.kill()
        attacker.wait()
    row.problems += window.problems[:5]
    return window


def _compare(row: Row, victim: Victim, before: Window, during: Window, held: Footprint, seconds: float) -> None:
    if not victim.lives:
        tail = victim.log.read_text(errors="replace")[-400:]
        row.problems.append(f"the server has ended with status {victim.server.process.returncode}: {tail}")
        return
    after = victim.settled(held, GROWTH_BYTES)
    row.gateways, row.counted_restarts = victim.restarts()
    row.first_token_ratio = during.median_first_token_s / before.median_first_token_s
    row.worst_first_token_ratio = during.worst_first_token_s / before.worst_first_token_s
    row.rate_ratio = during.tokens_per_s / before.tokens_per_s
    row.log_bytes_per_s = (after.log_bytes - held.log_bytes) / seconds
    row.grown_bytes = max(0, after.rss_bytes - held.rss_bytes)
    row.grown_descriptors = max(0, after.descriptors - held.descriptors)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=list(ATTACKS), metavar="NAME,…", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--transports", type=words, default=["ipc", "tcp"])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each attack")
    parser.add_argument("--strengths", type=numbers, default=[1, 4])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--save", type=Path, help="folder for attack.json")
    options = parser.parse_args()
    if unknown := set(options.only) - set(ATTACKS):
        parser.error(f"no attack {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    options.save = options.save or Path("bench/results") / time.strftime("attack-%Y%m%d-%H%M%S")
    return options


def main() -> None:
    options = parse()
    facts = describe("pyzmq", "msgpack")
    table: Table[Row] = Table(options.save / "attack.json", facts)
    table.say(f"{heading(facts)} | {options.streams} streams, {options.seconds:g} s each\n\n| {COLUMNS} |")
    table.say("|" + " --- |" * (COLUMNS.count("|") + 1))
    for transport in options.transports:
        for name in options.only:
            for strength in options.strengths:
                row = run_attack(name, transport, strength, options)
                table.add(row)
                for problem in row.problems:
                    table.say(f"    {problem}")
    if not table.is_good:
        raise SystemExit("an attack did more than it may")


if __name__ == "__main__":
    main()
