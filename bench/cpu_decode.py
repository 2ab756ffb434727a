"""Decode speed of SmolLM2-135M on the CPU: mgpu through its ZeroMQ client, beside transformers or llama.cpp.

Both sides are timed in the same way: a batch of N prompts of 128 tokens is answered once with 1 and once with 128
tokens; 127 N tokens over the difference of the two times is the decode rate. The sides take turns, so that a machine
whose speed drifts treats them alike.

    python -m bench.cpu_decode [--rounds 3] [--streams 1 8] [--json FILE]      # fp32, beside transformers
    python -m bench.cpu_decode --peer llama.cpp --dtype bfloat16               # the Q4_1 file as it is, in both

llama.cpp is the package xllamacpp, in the types of the file. Its threads do not spin while they wait with
`--no-spinning`, which is fairer to it on a machine that does other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mgpu.launch.bench.report import describe, heading
from mgpu.launch.server_process import running_server
from mgpu.orchestrator.models.find import resolve_model

PROMPT_TOKENS = 128
NEW_TOKENS = 128


def prompts(streams: int) -> list[list[int]]:
    """Distinct prompts, so that no side can share work between streams."""
    return [[1 + (7919 * (stream + 1) + 104729 * i) % 40000 for i in range(PROMPT_TOKENS)] for stream in range(streams)]


def decode_rate(answer: Callable[[list[list[int]], int], None], streams: int) -> float:
    """Tokens per second of all streams together."""

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        answer(prompts(streams), new_tokens)
        return time.perf_counter() - start

    short = min(seconds(1) for _ in range(2))
    return streams * (NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - short)


def measure_mgpu(streams: list[int], rounds: int, dtype: str) -> dict[int, list[float]]:
    from mgpu import Client

    with running_server("-m", "demo", "--device", "cpu", "--dtype", dtype, "--no-prefix-cache") as endpoint:

        def answer(batch: list[list[int]], new_tokens: int) -> None:
            def one(ids: list[int]) -> None:
                with Client(endpoint, timeout_s=600) as client:
                    done = client.generate(ids, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
                    assert len(done.token_ids) == new_tokens

            threads = [threading.Thread(target=one, args=(ids,)) for ids in batch]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        answer(prompts(1), 8)
        return {n: [decode_rate(answer, n) for _ in range(rounds)] for n in streams}


def measure_peer(peer: str, streams: list[int], rounds: int, more: list[str]) -> dict[int, list[float]]:
    """Run in a process of its own: the model must not share the cores with anything."""
    command = [sys.executable, "-m", "bench.cpu_decode", "--as", peer, "--rounds", str(rounds), *more]
    command += ["--streams", *map(str, streams)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3600).stdout
    return {int(n): rates for n, rates in json.loads(output.splitlines()[-1]).items()}


def transformers_process(streams: list[int], rounds: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    golden = json.loads((Path(__file__).parent.parent / "tests/golden/smollm2-135m-instruct.json").read_text())
    config = LlamaConfig(**{name: value for name, value in golden["config"].items() if name != "model_type"})
    model = LlamaForCausalLM(config).to(torch.float32).eval()  # random weights: as fast as any others

    def answer(batch: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == PROMPT_TOKENS + new_tokens

    answer(prompts(1), 8)
    print(json.dumps({n: [decode_rate(answer, n) for _ in range(rounds)] for n in streams}))


def llama_cpp_process(streams: list[int], rounds: int, spins: bool) -> None:
    from bench.peers.llama_cpp import make_server

    sizes = {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "concurrency": [max(streams)],
        "rate": [],
        "burst": [],
    }
    options = argparse.Namespace(**sizes, threads=len(os.sched_getaffinity(0)), spins=spins)
    server = make_server(resolve_model("demo").path, options)

    def answer(batch: list[list[int]], new_tokens: int) -> None:
        def one(ids: list[int]) -> None:
            question = {"prompt": ids, "n_predict": new_tokens, "max_tokens": new_tokens, "ignore_eos": True}
            texts: list[str] = []
            server.handle_completions(json.dumps(question | {"temperature": 0.0, "cache_prompt": False}), texts.append)
            assert json.loads(texts[-1])["usage"]["completion_tokens"] == new_tokens

        with ThreadPoolExecutor(len(batch)) as threads:
            list(threads.map(one, batch))

    answer(prompts(1), 8)
    print(json.dumps({n: [decode_rate(answer, n) for _ in range(rounds)] for n in streams}), flush=True)


PEERS = ("transformers", "llama.cpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", choices=PEERS, default="transformers")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of mgpu")
    parser.add_argument("--no-spinning", action="store_true", help="threads of llama.cpp sleep while they wait")
    parser.add_argument("--as", dest="role", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "transformers":
        transformers_process(options.streams, options.rounds)
        return
    if options.role == "llama.cpp":
        llama_cpp_process(options.streams, options.rounds, not options.no_spinning)
        return
    peer = options.peer
    facts = describe("transformers" if peer == "transformers" else "xllamacpp")
    print(heading(facts))
    rates: dict[str, dict[int, list[float]]] = {"mgpu": {}, peer: {}}
    more = ["--no-spinning"] if options.no_spinning else []
    for _ in range(options.rounds):
        found = {peer: measure_peer(peer, options.streams, 1, more)}
        found["mgpu"] = measure_mgpu(options.streams, 1, options.dtype)
        for name, by_streams in found.items():
            for n, values in by_streams.items():
                rates[name].setdefault(n, []).extend(values)
    print(f"{'streams':>8} {f'{peer} tok/s':>26} {f'mgpu {options.dtype} tok/s':>26} {'ratio':>7}")
    for n in options.streams:
        theirs, ours = rates[peer][n], rates["mgpu"][n]
        ratio = statistics.median(ours) / statistics.median(theirs)
        print(f"{n:>8} {_spread(theirs):>26} {_spread(ours):>26} {ratio:>6.2f}x")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": facts, "tokens_per_s": rates}, indent=1))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


if __name__ == "__main__":
    main()
