"""Show how much of a chat a server computes again: each turn's prompt is all of the chat so far.

    python -m bench.chat_turns [--shape 35B-A3B] [--turns 20] [--asked 60] [--answered 90] [-- SERVE OPTIONS]

A server of random weights, in a small version of the shape (``--full``: in its real size), on the CPU unless SERVE
OPTIONS say otherwise. A turn asks with so many new tokens and takes so many. What is new must be computed; the rest is
what the prefix cache is for. A model with linear layers goes on from a kept state only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from mgpu import Client
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.bench.shapes import SHAPES, SMALL, Config, write_config
from mgpu.launch.server_process import ServerProcess

_FEW: Config = {
    "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2,
}  # fmt: skip


def small(config: Config) -> Config:
    """Return a version of a shape that is small enough for a CPU."""
    return {**config, **SMALL, **{key: value for key, value in _FEW.items() if key in config}}


def main() -> None:
    arguments, options = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="35B-A3B")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--asked", type=int, default=60)
    parser.add_argument("--answered", type=int, default=90)
    parser.add_argument("--full", action="store_true")
    asked = parser.parse_args(arguments)
    config = SHAPES[asked.shape] if asked.full else small(SHAPES[asked.shape])
    longest = asked.turns * (asked.asked + asked.answered) + 64
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder), config)
        common = "-m", str(model), "--load-format", "dummy", "--max-seq-len", str(longest), "--max-rows", "4"
        with ServerProcess(*common, *(options or ["--device", "cpu"])) as server, Client(server.wait_ready()) as client:
            show(client, asked.turns, asked.asked, asked.answered)


def show(client: Client, turns: int, asked: int, answered: int) -> None:
    """Print what each fifth turn computes again, and the share of the whole chat."""
    print(heading(describe()))
    history: list[int] = []
    repeated = again = 0
    for turn in range(turns):
        seen = len(history)
        history += [3 + (37 * i + 11 * turn) % 997 for i in range(asked)]
        done = client.stream(history, max_tokens=answered, ignore_eos=True).completion()
        cached = done.usage.cached_tokens
        repeated += seen
        again += max(0, seen - cached)
        if turn % 5 == 4:
            print(f"turn {turn + 1}: {len(history):,} tokens of prompt, {seen:,} of them before, {cached:,} cached")
        history += done.token_ids
    share = again / repeated if repeated else 0.0
    print(f"{turns} turns: of {repeated:,} tokens that had been computed, {again:,} were computed again: {share:.1%}")


if __name__ == "__main__":
    main()
