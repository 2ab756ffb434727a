"""Break tiny models of every stored format, one thing at a time, and see that each is refused well.

`python -m bench.broken [--only PART,…]` tries some 12,500 breakages (two minutes of a core): scales and zero
points of other shapes and types, numbers that are not finite, groups that do not divide or do not exist, types and
methods that nobody knows, files that are cut or missing. A finding is a crash, a wait, a refusal without file
and tensor, or a model that is loaded although its header or its numbers cannot be meant. The test suite tries a sample.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.broken.breakages import breakages
from bench.broken.examine import examine
from bench.broken.models import MODELS
from bench.options import words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=[], metavar="PART,…", help="models whose name has such a part")
    parser.add_argument("--most", type=int, default=20, help="findings that are shown of each model")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors are tiny
    bad = 0
    print("| model | broken | refused | loaded | wrong | s |\n| --- | --- | --- | --- | --- | --- |")
    for name, model in MODELS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mgpu-broken-") as folder:
            all_breakages = list(breakages(model))
            verdicts = [(each.name, examine(model, each, Path(folder))) for each in all_breakages]
        wrong = [(what, verdict) for what, verdict in verdicts if verdict.problem]
        refused = sum(bool(verdict.refusal) for _, verdict in verdicts)
        print(
            f"| {name} | {len(verdicts)} | {refused} | {len(verdicts) - refused} | {len(wrong)} | "
            f"{time.monotonic() - began_s:.1f} |", flush=True,
        )  # fmt: skip
        for what, verdict in wrong[: options.most]:
            print(f"    {what}: {verdict.problem.strip()}", flush=True)
        bad += len(wrong)
    if bad:
        sys.exit(f"{bad} broken models were not received as they should be")


if __name__ == "__main__":
    main()
