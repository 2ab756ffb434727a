"""Perplexity of a GGUF file as llama.cpp computes it (the package xllamacpp, CPU), over the text of `bench.perplexity`.

    python -m bench.peers.llama_cpp_perplexity -m demo --tokens 2048

Same tokens, same windows, same mean as `python -m bench.perplexity`, so the two numbers compare two programs on one
file. The server scores only tokens that it generates. So each token of the text is forced by a logit bias, and asked
for by a request of its own, whose prompt is the text before it; the server keeps that prompt's keys and values. The
log-probability that it reports is that of the logits before the bias.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from bench.peers.peer import need
from bench.perplexity import TEXT, find, text_windows
from mgpu.launch.bench.report import describe, heading
from mgpu.orchestrator.models.find import resolve_model

_BIAS = 1000.0
"""More than any two logits differ by."""


def make_server(model: str, window: int, threads: int) -> Any:
    """Start a server with one slot, as long as a window."""
    try:
        import xllamacpp
    except ImportError as error:
        raise need("xllamacpp", error) from error
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = 1
    params.n_ctx = window + 16
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # a thread that spins takes another process's core
    params.n_gpu_layers = 0
    params.verbosity = 0
    params.port = 0
    return xllamacpp.Server(params)


def log_probability(server: Any, before: list[int], token: int) -> float:
    """Return log p of ``token`` after the tokens ``before``."""
    question = {
        "prompt": before,
        "max_tokens": 1,
        "n_predict": 1,
        "ignore_eos": False,
        "temperature": 0.0,
        "logprobs": 1,
        "logit_bias": [[token, _BIAS]],
        "cache_prompt": True,
    }
    answers: list[str] = []
    server.handle_completions(json.dumps(question), lambda text: answers.append(text))
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise SystemExit(f"llama.cpp: {answer['error']}")
    scored = answer["choices"][0]["logprobs"]["content"][0]
    if scored["id"] != token:
        raise SystemExit(f"llama.cpp chose token {scored['id']}, although the bias forces {token}")
    return float(scored["logprob"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo", help="a .gguf file, or demo")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens of the text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    print(heading(describe("xllamacpp")), flush=True)
    model = resolve_model(find(options.model))
    server = make_server(model.path, options.window, options.threads)
    scores: list[float] = []
    for ids in text_windows(model, options.text, options.tokens, options.window):
        scores += [log_probability(server, ids[:end], ids[end]) for end in range(1, len(ids))]
        mean = math.exp(-math.fsum(scores) / len(scores))
        print(f"{model.name:24} llama.cpp        perplexity {mean:8.3f} over {len(scores)} tokens", flush=True)


if __name__ == "__main__":
    main()
