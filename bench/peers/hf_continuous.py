"""Hugging Face transformers' continuous batching under the loads of `mgpu-launch bench serve`.

python -m bench.peers.hf_continuous --shape 135M --concurrency 1,2,4,8 --prompt-tokens 128 --new-tokens 128 --save F
"""

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from typing import Any

from bench.peers.hf_model import make_model
from bench.peers.peer import DEADLINE_S, add_model_options, measure, need, parse
from mgpu.launch.bench.load import Request, Send
from mgpu.launch.bench.shapes import SHAPES

try:
    from transformers import ContinuousBatchingConfig, GenerationConfig
except ImportError as error:
    raise need("'transformers>=5'", error) from error


def sender(manager: Any) -> Send:
    """Make a sender of a running manager. Its results come on the event loop, one per token."""

    async def send(request: Request) -> AsyncIterator[int]:
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        request_id = f"bench-{id(arrived):x}"
        manager.register_result_handler(request_id, arrived.put_nowait)
        manager.add_request(
            list(request.prompt_ids),
            request_id=request_id,
            max_new_tokens=request.new_tokens,
            streaming=True,
            eos_token_id=-1,
        )
        seen = 0
        while True:
            result = await asyncio.wait_for(arrived.get(), DEADLINE_S)
            if result.error:
                raise RuntimeError(result.error)
            yield len(result.generated_tokens) - seen
            seen = len(result.generated_tokens)
            if result.is_finished():
                return

    return send


def start_manager(model: Any, new_tokens: int) -> Any:
    """Start continuous batching of a model; ``stop`` it in the end."""
    # Prompts are random, so that nothing could be shared; mgpu keeps its prefix cache on as well.
    settings = GenerationConfig(do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0)
    options = {}
    if importlib.util.find_spec("flash_attn") is None:  # else it would ask a hub for one
        options = {name: False for name in ("auto_switch_to_flash",) if hasattr(ContinuousBatchingConfig, name)}
    manager = model.init_continuous_batching(
        generation_config=settings, continuous_batching_config=ContinuousBatchingConfig(**options)
    )
    manager.start()
    return manager


def main() -> None:
    options = parse(__doc__ or "", add_model_options)
    model, facts = make_model(options.shape, SHAPES[options.shape], options.device)
    manager = start_manager(model, options.new_tokens)
    try:
        vocab_size = model.config.vocab_size
        measure("transformers continuous", sender(manager), vocab_size, options, "transformers", **facts)
    finally:
        manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main()
