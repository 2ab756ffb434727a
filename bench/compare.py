"""Put mgpu and its peers under the same loads, one after the other, and draw them in one picture.

    python -m bench.compare                                # SmolLM2-135M's shape on the CPU
    python -m bench.compare --shape 8B --device cuda --bandwidth 4.30TB/s --concurrency 1,8,64,256

Results lie in bench/results/compare, one file per engine; `--draw` makes the picture again from what lies there. A
machine that does other work is refused: its numbers would be about that.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from bench.options import words
from bench.performance.chart import caption, draw, read_lines

RESULTS = Path(__file__).parent / "results" / "compare"
MOST_LOAD = 1.0
"""Load average of the last minute above which nothing is measured."""
DEADLINE_S = 3600.0
PEERS = ("hf_generate", "hf_continuous", "llama_cpp")


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of every engine that was asked for, mgpu first."""
    load = ["--concurrency", options.concurrency, "--requests", str(options.requests), "--repeat", str(options.repeat)]
    load += ["--prompt-tokens", str(options.prompt_tokens), "--new-tokens", str(options.new_tokens)]
    bandwidth = ["--bandwidth", options.bandwidth] if options.bandwidth else []
    mgpu = [sys.executable, "-m", "mgpu.launch.cli", "bench", "serve", "--shape", options.shape, *load, *bandwidth]
    found = {"mgpu": [*mgpu, "--save", str(RESULTS / "mgpu.json"), "--", "--device", options.device]}
    for peer in options.peers:
        model = [] if peer == "llama_cpp" else ["--shape", options.shape, "--device", options.device]
        script = [sys.executable, "-m", f"bench.peers.{peer}", *model, *load]
        found[peer] = [*script, "--save", str(RESULTS / f"{peer}.json")]
    return found


def picture(engines: list[str], output: Path) -> None:
    """Draw what lies there of the engines."""
    files = [path for engine in engines if (path := RESULTS / f"{engine}.json").exists()]
    if not files:
        raise SystemExit(f"error: no results in {RESULTS}; leave --draw out to measure")
    output.write_text(draw([line for path in files for line in read_lines(path)], caption(files[0])))
    print(f"drew {', '.join(path.stem for path in files)} in {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135M")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bandwidth", default="")
    parser.add_argument("--peers", type=words, default=list(PEERS[:2]))
    parser.add_argument("--concurrency", default="1,2,4,8")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "throughput.svg")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--any-load", action="store_true", help="measure although the machine does other work")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        raise SystemExit(f"error: no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    todo = commands(options)
    if not options.draw:
        load = os.getloadavg()[0]
        if load > MOST_LOAD and not options.any_load:
            raise SystemExit(f"error: the load of this machine is {load:.1f}; wait until it is quiet, or --any-load")
        RESULTS.mkdir(parents=True, exist_ok=True)
        for engine, command in todo.items():
            print(f"{engine}:", flush=True)
            if status := subprocess.run(command, check=False, timeout=DEADLINE_S, stdin=subprocess.DEVNULL).returncode:
                raise SystemExit(f"error: {engine} ended with status {status}")
    picture(list(todo), options.output)


if __name__ == "__main__":
    main()
