"""Attack a real server beside honest streams, and count what those lose: `make attack`.

On each transport a server, 16 compared streams and a prober go through one attack after another: they are watched
alone, then during the attack, then after it. Ratios compare the attack with the seconds without one before it, and
those before the earlier attacks on this server. Where there are two cores or more the attacker has the last one to
itself, in all of the run. An attack that needs another server, and the one after a server that has ended, get their
own.

    python -m bench.attack [--only NAME,…] [--transports ipc,tcp] [--seconds 60] [--strengths 1,4] [--streams 16]
                           [--calm SECONDS] [--model demo] [--save FOLDER]

With ``--model small`` a model of random weights is made for the purpose. To run several side by side, give each its
cores: `taskset -c 0-2 python -m bench.attack …`.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from bench.attack.attacks import ATTACKS, situation_of
from bench.attack.row import COLUMNS, Row
from bench.attack.siege import Siege
from bench.attack.victim import Transport
from bench.options import numbers, words
from bench.report import Table
from mgpu.launch.bench.report import describe, heading


def run_attacks(transport: Transport, options: argparse.Namespace) -> Iterator[Row]:
    """Run the attacks of ``options.only`` at each strength, as few servers as possible after one another."""
    for situation, group in itertools.groupby(options.only, situation_of):
        waiting = [(name, strength) for name in group for strength in options.strengths]
        while waiting:
            with Siege(options.model, transport, situation, options.streams) as siege:
                while waiting and siege.lives:
                    yield siege.run(*waiting.pop(0), options.seconds, options.calm)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=list(ATTACKS), metavar="NAME,…", help=f"of {', '.join(ATTACKS)}")
    parser.add_argument("--transports", type=words, default=["ipc", "tcp"])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each attack")
    parser.add_argument("--calm", type=float, help="seconds without an attack before each; a quarter of --seconds")
    parser.add_argument("--strengths", type=numbers, default=[1, 4])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--save", type=Path, help="folder for attack.json")
    options = parser.parse_args()
    if unknown := set(options.only) - set(ATTACKS):
        parser.error(f"no attack {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}")
    if options.calm is None:
        options.calm = min(max(5.0, options.seconds / 4), 2 * options.seconds)
    options.save = options.save or Path("bench/results") / time.strftime("attack-%Y%m%d-%H%M%S")
    return options


def main() -> None:
    options = parse()
    facts = describe("pyzmq", "msgpack")
    table: Table[Row] = Table(options.save / "attack.json", facts)
    table.say(f"{heading(facts)} | {options.streams} streams, {options.seconds:g} s each\n\n| {COLUMNS} |")
    table.say("|" + " --- |" * (COLUMNS.count("|") + 1))
    for transport in options.transports:
        for row in run_attacks(transport, options):
            table.add(row)
            for problem in row.problems:
                table.say(f"    {problem}")
    if not table.is_good:
        raise SystemExit("an attack did more than it may")


if __name__ == "__main__":
    main()
