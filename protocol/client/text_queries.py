"""Build the messages that ask what a prompt becomes, and say when a refused question may be asked again."""

import time
from collections.abc import Mapping, Sequence

from mgpu.protocol.client.requests.request_message import checked, messages_field, prompt_field
from mgpu.protocol.client.transport.resumable import RETRY_S
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.client_messages import TextResult

Prompt = str | Sequence[Mapping[str, object]]
"""Text, or chat messages."""
TemplateOptions = Mapping[str, object] | None
Tools = Sequence[Mapping[str, object]] | None


def tokenize_message(
    prompt: Prompt,
    returns: TextResult,
    template_options: TemplateOptions = None,
    add_special_tokens: bool = True,
    tools: Tools = None,
    documents: Tools = None,
) -> dict[str, object]:
    """Build and check a tokenize message, but for its id. RequestFailed says what is wrong."""
    options = {"template_options": template_options, "tools": tools, "documents": documents}
    options["add_special_tokens"] = add_special_tokens  # type: ignore[assignment]
    return checked({"type": "tokenize", "id": 0, **_field(prompt), "returns": returns, **options})


def _field(prompt: Prompt) -> dict[str, object]:
    if isinstance(prompt, (str, bytes, bytearray, memoryview)):
        return prompt_field(prompt)
    return messages_field(prompt)


def detokenize_message(
    token_ids: Sequence[int], skip_special_tokens: bool = False, timeout_s: float | None = None
) -> dict[str, object]:
    """Build and check a detokenize message, but for its id. RequestFailed says what is wrong."""
    listed = token_ids if isinstance(token_ids, bytes) else list(token_ids)
    message = {"token_ids": listed, "skip_special_tokens": skip_special_tokens, "timeout_s": timeout_s}
    return checked({"type": "detokenize", "id": 0, **message})


def wait_before_retry_s(error: RequestFailed, retries_left: int, deadline_s: float) -> float:
    """Return how long to wait before a refused question is asked again; raise ``error`` if it is for good."""
    wait_s = error.retry_after_s or RETRY_S
    if error.code != "overloaded" or retries_left <= 0 or time.monotonic() + wait_s >= deadline_s:
        raise error
    return wait_s
