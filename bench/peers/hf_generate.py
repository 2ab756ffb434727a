"""Hugging Face transformers' `generate` under the loads of `mgpu-launch bench serve`.

    python -m bench.peers.hf_generate --shape 135M --concurrency 1,2,4,8 --prompt-tokens 128 --new-tokens 128 --save F

`generate` answers one batch at a time: what waits when it is free becomes the next batch.
"""

import threading
from collections.abc import Callable
from queue import Empty, Queue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from bench.peers.hf_model import make_model
from bench.peers.peer import add_model_options, measure, most_at_once, parse, streamed
from mgpu.launch.bench.load import Request
from mgpu.launch.bench.shapes import SHAPES

Notify = Callable[[int | Exception | None], None]
GATHER_S = 0.005
"""How long to wait for one more request of a batch that is not full."""


class Counter(BaseStreamer):  # type: ignore[misc]
    """Reports one token to every request of the batch at each step; the first call brings the prompts."""

    def __init__(self, listeners: list[Notify]) -> None:
        self._listeners = listeners
        self._seen_prompt = False

    def put(self, value: Any) -> None:
        for notify in self._listeners if self._seen_prompt else ():
            notify(1)
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing: the batch as a whole says when it is done."""


class Batches:
    """Answers what waits, batch by batch, on a thread of its own. All requests have the same lengths."""

    def __init__(self, model: Any, most: int) -> None:
        self._model = model
        self._most = most
        self._waiting: Queue[tuple[Request, Notify]] = Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, request: Request, notify: Notify) -> None:
        self._waiting.put((request, notify))

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            try:
                while len(batch) < self._most:
                    batch.append(self._waiting.get(timeout=GATHER_S))
            except Empty:
                pass
            end: Exception | None = None
            try:
                self._answer([request for request, _ in batch], [notify for _, notify in batch])
            except Exception as error:  # the edge of the thread: whoever asked is told
                end = error
            for _, notify in batch:
                notify(end)

    @torch.inference_mode()
    def _answer(self, requests: list[Request], listeners: list[Notify]) -> None:
        ids = torch.tensor([list(request.prompt_ids) for request in requests], device=self._model.device)
        count = requests[0].new_tokens
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            streamer=Counter(listeners),
        )


def main() -> None:
    options = parse(__doc__ or "", add_model_options)
    model, facts = make_model(options.shape, SHAPES[options.shape], options.device)
    batches = Batches(model, most_at_once(options))
    send = streamed(batches.start)
    measure("transformers generate", send, model.config.vocab_size, options, "transformers", **facts)


if __name__ == "__main__":
    main()
