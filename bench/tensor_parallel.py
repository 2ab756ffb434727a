"""Show on two or more GPUs what own all-reduce kernels and CUDA graphs give a tensor-parallel server.

    python -m bench.tensor_parallel [--ranks 2] [--only tests,all-reduce,decode]

Tests of the kernels and of tokens against one GPU, a table of all-reduces, and decoding of Llama-3.1-8B with random
weights, with the kernels and without (MGPU_PEER_REDUCE=0). Takes about three minutes; the status is 1 if a part fails.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PART_S = 300.0
TESTS = (
    "tests/worker/kernels/peers/test_peers.py",
    "tests/worker/ranks/test_peer_group.py",
    "tests/e2e/test_multi_gpu.py",
)
DECODE = [
    "-m",
    "mgpu.launch.cli",
    "bench",
    "decode",
    "--shape",
    "8B",
    "--batches",
    "1,8,64",
    "--contexts",
    "128",
    "--repeat",
    "3",
]


def parts(ranks: str) -> dict[str, list[tuple[str, list[str], Mapping[str, str]]]]:
    """Return commands by section: what it is, the arguments of Python, additions to the environment."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    decode = [*DECODE, "--", "--tp", ranks, "--max-seq-len", "4096"]
    return {
        "tests": [("tests", pytest, {})],
        "all-reduce": [("all-reduce", ["-m", "bench.all_reduce", "--device", "cuda", "--ranks", ranks], {})],
        "decode": [
            ("decode, own kernels", decode, {}),
            ("decode, NCCL without graphs", decode, {"MGPU_PEER_REDUCE": "0"}),
        ],
    }


def run(what: str, arguments: list[str], environ: Mapping[str, str]) -> bool:
    """Run one part with its output shown; say whether it went well."""
    print(f"--- {what}", flush=True)
    began_s = time.monotonic()
    try:
        status = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environ}, timeout=PART_S
        ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    print(f"--- {what}: status {status} after {time.monotonic() - began_s:.0f} s", flush=True)
    return status == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--only", default="tests,all-reduce,decode")
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # without NVLink multicast, which not every host can give
    sections = parts(arguments.ranks)
    if unknown := set(arguments.only.split(",")) - set(sections):
        parser.error(f"--only {', '.join(sorted(unknown))}: the sections are {', '.join(sections)}")
    results = [run(*part) for name in arguments.only.split(",") for part in sections[name]]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
