"""The attacking process: ``python -m bench.attack.attacker NAME ENDPOINT SECONDS STRENGTH CORE [KEY_FILE]``.

It runs on a core of its own where there is one, so that what an attack costs the server is not mistaken for what the
attacker itself takes. Prints its cost as JSON.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.attack.attacks import ATTACKS
from bench.attack.attacks.clock import Clock
from bench.attack.peers import Attacker


def main() -> None:
    name, endpoint, seconds, strength, core, *rest = sys.argv[1:]
    if int(core) >= 0:
        os.sched_setaffinity(0, {int(core)})
    attacker = Attacker(endpoint, Path(rest[0]) if rest else None, int(strength))
    try:
        ATTACKS[name](attacker, Clock(time.monotonic() + float(seconds)))
    finally:
        attacker.close()
    print(json.dumps(asdict_of(attacker) | {"cpu_s": time.process_time()}))


def asdict_of(attacker: Attacker) -> dict[str, float]:
    return asdict(attacker.cost)


if __name__ == "__main__":
    main()
