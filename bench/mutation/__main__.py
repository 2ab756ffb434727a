"""Change a sample of places one at a time, and print how many changes a test notices, and which nothing does.

    make mutation                       # 300 places over all wings: hours on two cores
    python -m bench.mutation --places 40 --seed 7 --jobs 2

A change that makes a test hang counts as caught. A test that fails is run again without the change; if it fails then
too, the change is not counted. Some changes change no behaviour (30 s instead of 31): read the survivors.
"""

import argparse
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from bench.mutation.places import changes_of, operators, sample, sources
from bench.mutation.trial import Trial, copy_of, try_change

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
    parser.add_argument("--stages", type=int, default=3, help="1: a file's own tests; 2: its folder's; 3: wider ones")
    parser.add_argument("--only", default="", help="only files whose path begins so")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    names = operators(rng)
    files = [str(file) for file in sources(ROOT) if str(file).startswith(options.only)]
    sizes = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    changes = sample(sizes, lambda file: changes_of(ROOT, file, names), options.places, rng)
    print(f"{len(changes)} places of {len(files)} files, drawn with seed {options.seed}", flush=True)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="mgpu-mutation-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy_of(ROOT, Path(folder) / str(number))
            copies.put(Path(folder) / str(number))
        with ThreadPoolExecutor(options.jobs) as pool:

            def work(number: int) -> Trial:
                copy = copies.get()
                try:
                    return try_change(copy, changes[number], options.timeout, options.stages)
                finally:
                    copies.put(copy)

            for trial in pool.map(work, range(len(changes))):
                trials.append(trial)
                change = trial.change
                print(f"{trial.outcome:9} {trial.seconds:4.0f} s  {change.file}:{change.line}  {trial.by}", flush=True)
    print("\nsurvivors:")
    for trial in trials:
        if trial.outcome == "survived":
            print(f"{trial.change.file}:{trial.change.line} {trial.change.operator}\n{trial.diff}")
    print(score(trials))


if __name__ == "__main__":
    main()
