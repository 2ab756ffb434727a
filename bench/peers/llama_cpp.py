"""llama.cpp's server (the package xllamacpp) under the loads of `mgpu-launch bench serve`, on the CPU.

    python -m bench.peers.llama_cpp -m MODEL.gguf --concurrency 1,2,4,8 --prompt-tokens 128 --new-tokens 128 --save F

It computes in the types of the file. mgpu does on the CPU too, in bfloat16, for matrices of 4 bits.
"""

import argparse
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.peers.peer import measure, most_at_once, need, parse, streamed
from mgpu.launch.bench.load import Request
from mgpu.orchestrator.models.find import resolve_model
from mgpu.protocol.checkpoint.read import read_checkpoint

Notify = Callable[[int | Exception | None], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="demo", help="a .gguf file, or demo")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-spinning", dest="spins", action="store_false", help="threads sleep while they wait")


def make_server(model: str, options: argparse.Namespace) -> Any:
    """Start a server whose slots are as many as requests can be in flight."""
    try:
        import xllamacpp
    except ImportError as error:
        raise need("xllamacpp", error) from error
    slots = most_at_once(options)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = slots * (options.prompt_tokens + options.new_tokens + 16)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    if not options.spins:  # threads that spin take the cores of what else runs
        params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.n_gpu_layers = 0
    params.cache_prompt = False
    params.verbosity = 0
    params.port = 0
    return xllamacpp.Server(params)


class Slots:
    """Asks the server on one thread per request in flight: its calls block."""

    def __init__(self, server: Any, count: int) -> None:
        self._server = server
        self._threads = ThreadPoolExecutor(count)

    def start(self, request: Request, notify: Notify) -> None:
        self._threads.submit(self._ask, request, notify)

    def _ask(self, request: Request, notify: Notify) -> None:
        question = {
            "prompt": list(request.prompt_ids),
            "n_predict": request.new_tokens,
            "max_tokens": request.new_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "cache_prompt": False,
            "stream": True,
        }
        answer = Answer(notify)
        end: Exception | None = None
        try:
            self._server.handle_completions(json.dumps(question), answer.take)
        except Exception as error:  # the edge of the thread: whoever asked is told
            end = error
        notify(end)


class Answer:
    """Counts the tokens of one answer. Some bring no text of their own; the last chunk says how many there were."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._seen = 0

    def take(self, text: str) -> None:
        """Take a chunk as the server writes it."""
        chunk = json.loads(text)
        if "error" in chunk:
            self._notify(RuntimeError(str(chunk["error"])))
        elif usage := chunk.get("usage"):
            self._notify(usage["completion_tokens"] - self._seen)
        else:
            self._notify(1)
            self._seen += 1


def main() -> None:
    options = parse(__doc__ or "", add_options)
    model = resolve_model(options.model).path
    vocab_size = read_checkpoint(model).facts.vocab_size
    slots = Slots(make_server(model, options), most_at_once(options))
    facts = {"model": Path(model).name, "dtype": "of the file", "device": "cpu"}
    measure("llama.cpp", streamed(slots.start), vocab_size, options, "xllamacpp", **facts)


if __name__ == "__main__":
    main()
