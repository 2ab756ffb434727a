"""Decide whether a request can run, and turn it into the sequences that the engine generates."""

import secrets
from collections.abc import Iterable
from hashlib import blake2b

from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.server_messages import Accepted, FailureCode
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewaySpec, Submit
from mgpu.protocol.internal.worker_messages import GREEDY_BELOW, RowSampling

RETRY_AFTER_S = 1.0


class Refusal(Exception):
    """A request that will not run: what its client is told."""

    def __init__(self, code: FailureCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


def check_state(info: EngineInfo | None) -> EngineInfo:
    """Give the engine's limits if it takes requests. Refusal while it starts or drains."""
    if info is not None and info.state in ("ready", "recovering"):  # the engine queues while it recovers
        return info
    if info is None or info.state == "starting":
        raise Refusal("not_ready", "the server is still loading the model", RETRY_AFTER_S)
    if info.state == "draining":
        raise Refusal("draining", "the server is finishing its last requests before it stops", RETRY_AFTER_S)
    raise Refusal("stopped", "the server has stopped")


def check_model(request: Generate, model_name: str) -> None:
    if request.model is not None and request.model != model_name:
        raise Refusal(
            "unknown_model", f"model {request.model[:80]!r} is not served here; this server has {model_name!r}"
        )


def admit(
    request: Generate,
    prompt: bytes,
    spec: GatewaySpec,
    info: EngineInfo,
    first_sequence: int,
    account: int = 0,
    weight: float = 1.0,
) -> tuple[Accepted, list[Submit]]:
    """Give the answer to the client and the sequences for the engine, numbered from ``first_sequence``.

    ``prompt`` is little-endian int32; ``account`` and ``weight`` are for the scheduler. Refusal with the numbers when
    ids or lengths do not fit the model.
    """
    ids = int32_array(prompt)
    if not ids:
        raise Refusal("bad_request", "the prompt is empty: it has no tokens")
    _check_vocabulary("the prompt", ids, spec.vocab_size)
    _check_vocabulary("stop_token_ids", request.stop_token_ids, spec.vocab_size)
    _check_vocabulary("logit_bias", (token_id for token_id, _ in request.logit_bias), spec.vocab_size)
    max_tokens = _room(request, len(ids), info)
    seed = secrets.randbits(53) if request.seed is None else request.seed  # 53: exact in every language
    stop_ids = list(dict.fromkeys([*([] if request.ignore_eos else spec.eos_token_ids), *request.stop_token_ids]))
    accepted = Accepted(request.id, spec.model_name, len(ids), max_tokens, seed)
    return accepted, [
        Submit(
            sequence_id=first_sequence + index,
            token_ids=prompt,
            max_tokens=max_tokens,
            stop_token_ids=stop_ids,
            sampling=_sampling(request, len(ids), stop_ids, seed_of_choice(seed, index)),
            cache_salt=request.cache_salt.encode(),
            priority=request.priority,
            account=account,
            weight=weight,
        )
        for index in range(request.n)
    ]


def _check_vocabulary(what: str, ids: Iterable[int], vocab_size: int) -> None:
    highest = max(ids, default=0)
    if highest >= vocab_size:
        raise Refusal("bad_request", f"{what} has token id {highest}; the vocabulary has ids 0 to {vocab_size - 1}")


def _room(request: Generate, prompt_tokens: int, info: EngineInfo) -> int:
    """Give the most tokens that may follow the prompt. Refusal when the context or the KV pool is too small."""
    limit = min(info.max_seq_len, info.kv_tokens)
    reason = "context" if info.max_seq_len <= info.kv_tokens else "KV cache"
    room = limit - prompt_tokens
    if room < 1:
        raise Refusal(
            "bad_request",
            f"the prompt has {prompt_tokens} tokens, but the {reason} holds {limit}: "
            f"at most {limit - 1} for the prompt and one new token",
        )
    wanted = room if request.max_tokens is None else request.max_tokens
    if wanted > room:
        raise Refusal(
            "bad_request",
            f"{prompt_tokens} prompt tokens and max_tokens {wanted} make {prompt_tokens + wanted}, but the {reason} "
            f"holds {limit}; use max_tokens {room} or less",
        )
    if request.min_tokens > wanted:
        raise Refusal("bad_request", f"min_tokens {request.min_tokens} is more than the {wanted} that fit")
    return wanted


def seed_of_choice(seed: int, index: int) -> int:
    """Give the seed of one of ``n`` choices; the first one equals a request of its own with the same seed."""
    if index == 0:
        return seed
    digest = blake2b(seed.to_bytes(8, "little") + index.to_bytes(4, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _sampling(request: Generate, prompt_tokens: int, stop_ids: list[int], seed: int) -> RowSampling:
    forbids = request.min_tokens > 0 and bool(stop_ids)
    return RowSampling(
        temperature=request.temperature if request.temperature >= GREEDY_BELOW else 0.0,
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=seed,
        logit_bias=list(request.logit_bias) or None,
        num_logprobs=-1 if request.logprobs is None else request.logprobs,
        banned_until=prompt_tokens + request.min_tokens if forbids else 0,
        banned_ids=stop_ids if forbids else None,
    )
