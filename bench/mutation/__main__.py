"""Change a sample of places one at a time, and print how many changes a test notices, and which nothing does.

    make mutation                       # 300 places over all wings: hours on two cores
    python -m bench.mutation --places 40 --seed 7 --jobs 2

A change that makes a test hang counts as caught. A test that fails is run again without the change; if it fails then
too, it is left out from then on. Some changes change no behaviour (30 s instead of 31): read the survivors.
A long list can be tried in parts: --skip 100 --take 100 is the second hundred of the same sample.
"""

import argparse
import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from bench.mutation.places import Change, changes_of, operators, sample, sources
from bench.mutation.trial import Suite, Trial, copy_of, try_change

ROOT = Path(__file__).parents[2]


def score(trials: list[Trial]) -> str:
    """Return the part of the changes that was caught."""
    counted = [trial for trial in trials if trial.outcome in ("caught", "survived")]
    caught = sum(trial.outcome == "caught" for trial in counted)
    return f"{caught} of {len(counted)} caught: {caught / max(1, len(counted)):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mutation", description=__doc__)
    parser.add_argument("--places", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="changes that are tried side by side")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the tests of one stage")
    stages = "1: a file's own tests; 2: those that import it; 3: its folder's; 4: wider ones"
    parser.add_argument("--stages", type=int, default=4, help=stages)
    parser.add_argument("--only", default="", help="only files whose path begins so")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of the sample")
    parser.add_argument("--take", type=int, default=None, help="try so many of the sample")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no trial begins")
    options = parser.parse_args()
    began_s = time.monotonic()
    rng = random.Random(options.seed)
    names = operators(rng)
    files = [str(file) for file in sources(ROOT) if str(file).startswith(options.only)]
    sizes = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    changes = sample(sizes, lambda file: changes_of(ROOT, file, names), options.places, rng)
    print(f"{len(changes)} places of {len(files)} files, drawn with seed {options.seed}", flush=True)
    numbered = list(enumerate(changes))[options.skip :][: options.take]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="mgpu-mutation-") as folder:
        idle: SimpleQueue[Suite] = SimpleQueue()
        cores: list[int | None] = [*sorted(os.sched_getaffinity(0))] if options.jobs > 1 else [None]
        failing: set[str] = set()
        for number in range(options.jobs):
            copy_of(ROOT, Path(folder) / str(number))
            idle.put(Suite(Path(folder) / str(number), options.timeout, cores[number % len(cores)], failing))
        with ThreadPoolExecutor(options.jobs) as pool:

            def work(number: int, change: Change) -> tuple[int, Trial] | None:
                if time.monotonic() - began_s > options.budget:
                    return None
                tests = idle.get()
                try:
                    return number, try_change(tests, change, options.stages)
                finally:
                    idle.put(tests)

            for future in as_completed(pool.submit(work, *each) for each in numbered):
                if done := future.result():
                    trials.append(done[1])
                    report(*done)
    print(f"left out, since they fail without a change: {' '.join(sorted(failing)) or 'nothing'}")
    print(f"{len(trials)} of {len(numbered)} places tried; {score(trials)}")


def report(number: int, trial: Trial) -> None:
    """Print what became of a change, and the change itself where no test noticed it."""
    change = trial.change
    print(f"{number:3} {trial.outcome:9} {trial.seconds:4.0f} s  {change.file}:{change.line}  {trial.by}", flush=True)
    if trial.outcome in ("survived", "unsure"):
        print(f"{change.operator}\n{trial.diff}", flush=True)


if __name__ == "__main__":
    main()
