"""What a chat demands of its answer: a call, or reasoning of a bounded length."""

from dataclasses import replace

from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.text.grammars.demanded_calls import FORMATS, call_grammar
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError
from mgpu.orchestrator.gateway.text.grammars.thinking_limit import ThinkingLimit
from mgpu.protocol.chat.formats import HARMONY, REASONING_FORMATS, ChatFormat
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.structured_outputs import MAX_BYTES


def demands_call(request: Generate) -> bool:
    """Return whether an answer must be a call."""
    return request.tool_choice not in ("auto", "none")


def with_demanded_call(request: Generate, chat_format: ChatFormat) -> Generate:
    """Return the request with the form of its answer. Refusal if calls of this model cannot be demanded."""
    if not demands_call(request):
        return request
    if chat_format.tools not in FORMATS:
        known, found = ", ".join(FORMATS), chat_format.tools or "unknown"
        raise Refusal(
            "bad_request",
            f"tool_choice can demand calls in the formats {known}; that of this model is {found}; use auto",
        )
    if request.structured_outputs is not None:
        raise Refusal("bad_request", "structured_outputs does not go with a tool_choice that demands a call; use auto")
    if request.ignore_eos or request.min_tokens:
        option = "ignore_eos" if request.ignore_eos else "min_tokens"
        raise Refusal("bad_request", f"{option} does not go with a tool_choice that demands a call")
    try:
        grammar = _grammar(request, chat_format)
    except GrammarError as error:
        raise Refusal("bad_request", f"tool_choice cannot demand this call: {error}") from None
    if len(grammar) > MAX_BYTES:
        text = f"the tools make a form of {len(grammar)} characters, the limit is {MAX_BYTES}; offer fewer tools"
        raise Refusal("bad_request", text)
    return replace(request, structured_outputs={"demanded": grammar})


def form_after_reasoning(request: Generate, chat_format: ChatFormat) -> dict[str, object] | None:
    """Return the form of an answer whose prompt has begun the reasoning; None if it is the same."""
    markers = REASONING_FORMATS.get(chat_format.reasoning)
    if markers is None or not demands_call(request):
        return None
    return {"demanded": _grammar(request, chat_format, markers.end)}


def thinking_limit(request: Generate, chat_format: ChatFormat) -> ThinkingLimit | None:
    """Return how long the reasoning may be; None if nothing bounds it, or the answer cannot have any."""
    most, reasoning = request.thinking_token_budget, chat_format.reasoning
    is_form_only = reasoning == HARMONY and request.structured_outputs is not None
    if most is None or not reasoning or is_form_only:
        return None
    return ThinkingLimit(most, reasoning, request.stop_token_ids)


def _grammar(request: Generate, chat_format: ChatFormat, reasoning_end: str = "") -> str:
    tools, choice = request.tools or (), request.tool_choice
    is_parallel, most = request.parallel_tool_calls, request.thinking_token_budget
    return call_grammar(tools, choice, chat_format.tools, is_parallel, reasoning_end, most)
