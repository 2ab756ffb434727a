"""Decide whether a request can run on the model that is served, and turn it into the engine's sequences."""

import secrets
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.text.generic_tools import knows_tools
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.chat.formats import ChatFormat, detected
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.front.seeds import seed_of_choice
from mgpu.protocol.front.server_messages import Accepted
from mgpu.protocol.internal.admission_rule import AdmissionRule
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewaySpec, Submit
from mgpu.protocol.internal.worker_messages import GREEDY_BELOW, LogitBias, RowGrammar, RowSampling


@dataclass(slots=True)
class ServedModel:
    """The text side of the model, and what the engine has announced of itself."""

    spec: GatewaySpec
    info: EngineInfo | None = None
    """None before the engine has announced itself."""
    codec: TextCodec | None = None
    """None when the model's folder has no tokenizer, and until it is loaded."""
    is_loaded: bool = False
    """The tokenizer is loaded, or there is none."""

    _sampling: dict[str, float] = field(default_factory=dict)
    """What the model's files say, for requests that do not."""
    _shown_with_markers: Callable[[int], bytes] | None = None

    def __post_init__(self) -> None:
        self._sampling = self.spec.sampling.given()

    @property
    def detected_format(self) -> ChatFormat:
        """How the model marks tool calls and reasoning, as its template or an option says."""
        template = None if self.codec is None else self.codec.template_source
        return detected(template, self.spec.tool_format, self.spec.reasoning_format)

    @property
    def chat_format(self) -> ChatFormat:
        """The same; where the template knows no tools, that in which the server shows them to the model."""
        found, template = self.detected_format, None if self.codec is None else self.codec.template_source
        is_generic = not found.tools and self.spec.tool_format == "auto" and template and not knows_tools(template)
        return ChatFormat("hermes", found.reasoning) if is_generic else found

    def with_format(self, accepted: Accepted, opens_reasoning: bool) -> Accepted:
        """Return the answer to a client that parses calls and reasoning."""
        found = self.chat_format
        return replace(
            accepted, tool_format=found.tools, reasoning_format=found.reasoning, in_reasoning=opens_reasoning
        )

    @property
    def shown_with_markers(self) -> Callable[[int], bytes]:
        """What a token shows to a client that parses calls and reasoning. The model has a tokenizer."""
        if self._shown_with_markers is None:
            assert self.codec is not None
            self._shown_with_markers = self.codec.shown_bytes_with(self.chat_format.markers())
        return self._shown_with_markers

    def with_defaults(self, data: dict[object, object]) -> dict[object, object]:
        """Return a client's message with the model's sampling, where it is a request that does not say."""
        if not self._sampling or data.get("type") != "generate":
            return data
        return {**data, **{name: value for name, value in self._sampling.items() if data.get(name) is None}}

    @property
    def public_info(self) -> EngineInfo:
        """The engine's state as clients see it: starting until the tokenizer is loaded too."""
        return self.info if self.info is not None and self.is_loaded else EngineInfo("starting", 0, 0, "")

    def check(self, request: Generate) -> None:
        """Raise Refusal if another model is asked for, or no requests are taken now."""
        name = self.spec.model_name
        if request.model is not None and request.model != name:
            text = f"model {request.model[:80]!r} is not served here; this server has {name!r}"
            raise Refusal("unknown_model", text)
        self.limits()

    def limits(self) -> EngineInfo:
        """Return the engine's limits. Refusal when it takes no requests: while it starts, drains or has stopped."""
        info = self.public_info
        if info.state == "starting":
            raise Refusal("not_ready", "the server is still loading the model", RETRY_AFTER_S)
        if info.state == "draining":
            raise Refusal("draining", "the server is finishing its last requests before it stops", RETRY_AFTER_S)
        if info.state == "stopped":
            raise Refusal("stopped", "the server has stopped")
        return info  # ready, or recovering: then the engine queues


def longest_prompt(info: EngineInfo) -> int:
    """Return the most tokens that a prompt may have and leave room for one more."""
    return min(info.max_seq_len, info.kv_tokens) - 1


def check_length(model: ServedModel, num_tokens: int, is_exact: bool = True) -> None:
    """Raise Refusal if a prompt of so many tokens, or of at least so many, fits in no case."""
    info = model.limits()
    if num_tokens > longest_prompt(info):
        raise Refusal("bad_request", _no_room(num_tokens, longest_prompt(info) + 1, info, is_exact))


def admit(
    model: ServedModel,
    request: Generate,
    prompt: bytes,
    first_sequence: int,
    share: Sequence[tuple[int, float]],
    grammar: str = "",
) -> tuple[Accepted, list[Submit]]:
    """Return the answer to the client and the sequences for the engine, numbered from ``first_sequence``.

    ``prompt`` is little-endian int32; ``share`` has number and weight of each part of the account, for the scheduler;
    ``grammar`` is for workers.
    Refusal with the numbers when ids or lengths do not fit the model.
    """
    ids, eos_ids = int32_array(prompt), [] if request.ignore_eos else model.spec.eos_token_ids
    max_tokens = _checked_max_tokens(request, ids, model.spec.vocab_size, model.limits())
    emitted = request.emitted_ids or b""
    num_emitted = len(emitted) // 4
    if num_emitted >= max_tokens:
        raise Refusal(
            "bad_request", f"emitted_ids are {num_emitted} tokens and max_tokens is {max_tokens}: all is said"
        )
    seed = secrets.randbits(53) if request.seed is None else request.seed  # 53: exact in every language
    stop_ids = list(dict.fromkeys([*eos_ids, *request.stop_token_ids]))
    if grammar and not stop_ids:
        raise Refusal(
            "bad_request",
            f"{_needs_grammar(request)} needs a token that ends the answer, and this model has none; "
            "give stop_token_ids",
        )
    bias = LogitBias.of(request.logit_bias)
    accepted = Accepted(request.id, model.spec.model_name, len(ids), max_tokens, seed)
    return accepted, [
        Submit(
            sequence_id=first_sequence + index,
            token_ids=prompt + emitted,
            max_tokens=max_tokens,
            stop_token_ids=stop_ids,
            sampling=_sampling(request, len(ids), stop_ids, seed_of_choice(seed, index), grammar, bias),
            cache_salt=request.cache_salt.encode(),
            priority=request.priority,
            account=[number for number, _ in share],
            weights=[weight for _, weight in share],
            num_emitted=num_emitted,
        )
        for index in range(request.n)
    ]


def _checked_max_tokens(request: Generate, ids: "array[int]", vocab_size: int, info: EngineInfo) -> int:
    """Return how many tokens may follow the prompt. Refusal when the request can never run."""
    # The engine would emit one token more than the KV pool holds; what clients are told is the size of the pool.
    rule = AdmissionRule(min(info.max_seq_len, info.kv_tokens), vocab_size)
    room = rule.room_after(len(ids))
    wanted = room if request.max_tokens is None else request.max_tokens
    problem = rule.problem_of(ids, wanted)
    if problem == "empty prompt":
        raise Refusal("bad_request", "the prompt is empty: it has no tokens")
    for what, token_ids in (
        ("the prompt", ids if problem == "unknown token" else ()),
        ("emitted_ids", int32_array(request.emitted_ids or b"")),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in request.logit_bias]),
    ):
        if (unknown := rule.unknown_id(token_ids)) is not None:
            text = f"{what} has token id {unknown}; the vocabulary has ids 0 to {vocab_size - 1}"
            raise Refusal("bad_request", text)
    if problem is not None:
        raise Refusal("bad_request", _too_long(len(ids), wanted, room, info))
    if request.min_tokens > wanted:
        raise Refusal("bad_request", f"min_tokens {request.min_tokens} is more than the {wanted} that fit")
    return wanted


def _too_long(prompt_tokens: int, wanted: int, room: int, info: EngineInfo) -> str:
    limit = prompt_tokens + room
    if room < 1:
        return _no_room(prompt_tokens, limit, info)
    return (
        f"{counted(prompt_tokens, 'prompt token')} and max_tokens {wanted} make {prompt_tokens + wanted}, but the "
        f"{_bottleneck(info)} holds {limit}; use max_tokens {room} or less"
    )


def _no_room(prompt_tokens: int, limit: int, info: EngineInfo, is_exact: bool = True) -> str:
    return (
        f"the prompt has {'' if is_exact else 'at least '}{counted(prompt_tokens, 'token')}, but the "
        f"{_bottleneck(info)} holds {limit}: at most {limit - 1} for the prompt and one new token"
    )


def _bottleneck(info: EngineInfo) -> str:
    return "context" if info.max_seq_len <= info.kv_tokens else "KV cache"


def _needs_grammar(request: Generate) -> str:
    return "thinking_token_budget" if request.structured_outputs is None else "structured_outputs"


def _sampling(
    request: Generate, prompt_tokens: int, stop_ids: list[int], seed: int, grammar: str, bias: LogitBias | None
) -> RowSampling:
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
        logit_bias=bias,
        num_logprobs=-1 if request.logprobs is None else request.logprobs,
        banned_until=prompt_tokens + request.min_tokens if forbids else 0,
        banned_ids=stop_ids if forbids else None,
        grammar=RowGrammar(grammar, stop_ids) if grammar else None,
    )
