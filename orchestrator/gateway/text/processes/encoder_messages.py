"""Messages between the gateway and the processes that work on text: four bytes of length, then a body."""

import struct
from dataclasses import dataclass

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt
from mgpu.orchestrator.gateway.text.grammars.thinking_limit import ThinkingLimit
from mgpu.protocol.front.client_messages import Detokenize, Tokenize
from mgpu.protocol.front.server_messages import Detokenized, Tokenized
from mgpu.protocol.internal.codec import Codec
from mgpu.protocol.internal.worker_messages import Vocabulary
from mgpu.protocol.model.facts import CheckpointFormat

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """Where the tokenizer is, and what one piece of work may take."""

    path: str
    model_format: CheckpointFormat
    vocab_size: int
    cpu_limit_s: float
    memory_bytes: int
    """Of address space, more than the process has once it has loaded the tokenizer."""


@dataclass(frozen=True, slots=True)
class TextTask:
    """One of: a prompt as text, as messages for the chat template, or a question about text."""

    longest: int
    """Most tokens that a prompt can have; of a longer one only the number of tokens is wanted."""
    prompt: str | None = None
    chat: ChatPrompt | None = None
    tokenize: Tokenize | None = None
    detokenize: Detokenize | None = None
    structured_outputs: dict[str, object] | None = None
    """The form of the answer, to be made into a grammar; with it, there need be no prompt."""
    structured_after_reasoning: dict[str, object] | None = None
    """Instead of it, if the prompt has begun the reasoning."""
    thinking: ThinkingLimit | None = None
    """Of a chat: the grammar is to bound its reasoning."""
    wants_vocabulary: bool = False


@dataclass(frozen=True, slots=True)
class TextReply:
    """The token ids of a prompt, the reply to a question, or why there is none."""

    token_ids: bytes = b""
    """Little-endian int32; empty if there are more than `TextTask.longest`."""
    num_tokens: int = 0
    is_exact: bool = True
    """False: there are at least ``num_tokens``."""
    opens_reasoning: bool = False
    """The prompt ends with the marker that begins reasoning, and the form of the answer has room for it."""
    tokenized: Tokenized | None = None
    detokenized: Detokenized | None = None
    grammar: str = ""
    """For workers: the form of the answer, and how long its reasoning may be."""
    vocabulary: Vocabulary | None = None
    error: str = ""
    """For the client."""
    cpu_s: float = 0.0
    is_last: bool = False
    """The process works on something that it cannot end by itself, and ends now."""


ENCODER = Codec(EncoderSpec, TextTask, TextReply)
