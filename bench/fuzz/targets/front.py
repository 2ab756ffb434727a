"""Bytes and messages between processes: the front channel in both directions, the internal links, raw ZMTP."""

import msgpack

from bench.fuzz.choices import Choices
from bench.fuzz.target import Target
from mgpu.orchestrator.gateway.front.socket import id_of
from mgpu.orchestrator.gateway.requests.resume_context import CONTEXT_CODEC
from mgpu.protocol.client.requests.answer import Answer
from mgpu.protocol.client.transport.resumable import ResumableRequest
from mgpu.protocol.errors import MgpuError
from mgpu.protocol.front import framing
from mgpu.protocol.front.client_messages import GENERATE_RULES, parse_client_message
from mgpu.protocol.front.fields import FieldError
from mgpu.protocol.front.server_messages import SERVER_TYPES, parse_server_message
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.gateway_messages import LINK
from mgpu.protocol.internal.worker_messages import CONTROL

CLIENT_WORDS = (
    "type", *GENERATE_RULES, "offsets", "generate", "resume", "cancel", "health", "stats", "models", "role", "content",
    "tokenize", "detokenize", "returns", "token_ids", "text", "count",
    "user", "enable_thinking", "thinking", "reasoning_effort", "date_string", "0123456789abcdef",
)  # fmt: skip
SERVER_WORDS = (
    "type", "id", *SERVER_TYPES, *(name for cls in SERVER_TYPES.values() for name in cls.__dataclass_fields__),
    "overloaded", "unknown_request", "stopped", "deadline_exceeded", "stop", "length", "cancelled", "text", "top",
)  # fmt: skip
EXAMPLES: tuple[dict[str, object], ...] = (
    {"type": "generate", "id": 1, "prompt": "Hello", "max_tokens": 5, "stream": True, "stop": ["x"], "seed": 3},
    {"type": "generate", "id": 2, "prompt_ids": b"\5\0\0\0", "logit_bias": [[5, 1.5]], "session": "0" * 16, "n": 2},
    {"type": "generate", "id": 3, "messages": [{"role": "user", "content": "x"}], "template_options": {}},
    {"type": "resume", "id": 3, "session": "0" * 16, "offsets": [0, -1]},
    {"type": "cancel", "id": 3},
    {"type": "stats", "id": 4},
    {"type": "tokenize", "id": 5, "messages": [{"role": "user", "content": "x"}], "returns": "text"},
    {"type": "detokenize", "id": 6, "token_ids": [5, 6]},
)  # fmt: skip
ANSWERS: tuple[dict[str, object], ...] = (
    {"type": "accepted", "id": 1, "model": "m", "prompt_tokens": 3, "max_tokens": 9, "seed": 5},
    {"type": "resumed", "id": 1, "offsets": [0, 0]},
    {"type": "tokens", "id": 1, "index": 0, "text": "x", "token_ids": [5],
     "logprobs": [{"text": "x", "logprob": -1.0, "top": [[5, -1.0, "x"]]}]},
    {"type": "tokens", "id": 1, "index": 1, "text": "", "token_ids": [], "finish_reason": "stop"},
    {"type": "finished", "id": 1, "finish_reasons": ["stop", "length"], "prompt_tokens": 3, "completion_tokens": 1,
     "cached_tokens": 0},
    {"type": "failed", "id": 1, "code": "overloaded", "message": "busy", "retry_after_s": 0.5},
    {"type": "keepalive", "id": 1},
)  # fmt: skip


def read_wire(data: bytes) -> None:
    """Take frames as the gateway does; the first byte says how the rest is cut into frames."""
    choices = Choices(data)
    kind = choices.number(7)
    frames = [framing.VERSION, choices.rest()]
    if kind == 6:
        frames = [choices.data(choices.number(40)) for _ in range(choices.number(6))]
    elif kind == 7:
        frames = [framing.VERSION, *(choices.data(choices.number(40)) for _ in range(choices.number(6)))]
    message = framing.unpack(frames)
    id_of(message)
    parse_client_message(message)


def wire_seeds() -> list[bytes]:
    return [b"\0" + msgpack.packb(example) for example in EXAMPLES]


def read_schema(data: bytes) -> None:
    """Build a message of known fields with odd values, and read it."""
    choices = Choices(data)
    message = choices.changed(choices.pick(EXAMPLES), CLIENT_WORDS)
    try:
        frames = framing.pack(message)
    except ValueError:  # not what MessagePack can hold
        return
    parse_client_message(framing.unpack(frames))


def read_answers(data: bytes) -> None:
    """Play a server: a client handles a few messages of it, and resumes between them."""
    choices = Choices(data)
    request = ResumableRequest({"type": "generate", "id": 1, "n": 2, "logprobs": 1, "session": "0" * 16}, retries=1)
    for _ in range(choices.number(7) + 1):
        if request.has_ended:
            return
        if not choices.number(15):
            request.disconnect()
            request.resume()
        message = choices.changed(choices.pick(ANSWERS), SERVER_WORDS)
        found = parse_server_message(framing.unpack([framing.VERSION, _packed(message)], framing.FROM_SERVER))
        hash(found.id)
        request.take(found)
    _use(request.answer)


def _packed(message: dict[str, object]) -> bytes:
    try:
        return framing.pack(message)[1]
    except ValueError:
        return b""


def _use(answer: Answer) -> None:
    answer.partial()
    answer.offsets()
    for piece in answer.pieces:
        repr(piece)


def read_internal(data: bytes) -> None:
    """Decode a message between mgpu's own processes: a stranger may have opened their folder."""
    codec = (LINK, CONTROL, CONTEXT_CODEC)[data[0] % 3 if data else 0]
    codec.decode(data[1:])


def _internal_seeds() -> list[bytes]:
    bodies = [
        [9, 5, "s", 1, b"x", []],
        [1, "ipc://x"],
        [5, 1, "stop"],
        [13],
        [10, 1, "s", 2, [0], [0]],
        [3, "ready", 1, 2, ""],
    ]
    return [bytes([kind]) + msgpack.packb(body) for body in bodies for kind in range(3)]


FRONT: dict[str, Target] = {
    "wire": Target(
        read_wire, (framing.WireError, FieldError), wire_seeds, tuple(msgpack.packb(word) for word in CLIENT_WORDS)
    ),
    "schema": Target(read_schema, (framing.WireError, FieldError), lambda: _numbered(len(EXAMPLES))),
    "answers": Target(read_answers, (framing.WireError, FieldError, MgpuError), lambda: _numbered(len(ANSWERS))),
    "internal": Target(read_internal, (CodecError,), _internal_seeds),
}


def _numbered(count: int) -> list[bytes]:
    return [bytes([number, 2, 3, 1, 1, 5, 2, 200, 4, 4]) for number in range(count)]
