"""POST /tokenize, /detokenize and /apply-template: what becomes of text before and after the model."""

from typing import Any

from starlette.types import ASGIApp

from mgpu.orchestrator.http.edge.errors import bad_request
from mgpu.orchestrator.http.requests.answers import unless_disconnected
from mgpu.orchestrator.http.requests.fields import MODEL
from mgpu.orchestrator.http.requests.rules import Messages
from mgpu.orchestrator.http.routes.call import Call
from mgpu.orchestrator.http.routes.models import checked_model
from mgpu.protocol.errors import RequestFailed
from mgpu.protocol.front.chat_messages import DOCUMENTS, TEMPLATE_OPTIONS, TOOLS
from mgpu.protocol.front.fields import INT32_MAX, Array, Flag, Integer, Rule, Text

_TEXT = Text(2**27 - 1)
MAX_IDS = 1 << 20
TOKENIZE_RULES: dict[str, Rule] = {
    "model": MODEL,
    "prompt": _TEXT,
    "content": _TEXT,
    "messages": Messages(),
    "add_special_tokens": Flag(),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "tools": TOOLS,
}
DETOKENIZE_RULES: dict[str, Rule] = {
    "model": MODEL,
    "tokens": Array(Integer(0, INT32_MAX), MAX_IDS),
    "skip_special_tokens": Flag(),
}
TEMPLATE_RULES: dict[str, Rule] = {
    "model": MODEL,
    "messages": Messages(),
    "chat_template_kwargs": TEMPLATE_OPTIONS,
    "tools": TOOLS,
    "documents": DOCUMENTS,
}


async def tokenize(call: Call) -> ASGIApp:
    """Return the token ids of a text (`prompt` or `content`) or of chat messages."""
    values = (await call.fields(TOKENIZE_RULES)).values
    given = [name for name in ("prompt", "content", "messages") if name in values]
    if len(given) != 1:
        raise bad_request(f"give one of prompt, content and messages, got {' and '.join(given) or 'none'}", "prompt")
    if "chat_template_kwargs" in values and given != ["messages"]:
        raise bad_request("chat_template_kwargs is for messages; leave it out", "chat_template_kwargs")
    model = await checked_model(call, values.get("model"))
    tokens = await unless_disconnected(call.request, _tokens(call, values, given[0])) if values[given[0]] else []
    return call.json({"tokens": tokens, "count": len(tokens), "max_model_len": model["max_model_len"]})


async def _tokens(call: Call, values: dict[str, Any], given: str) -> list[int]:
    return await call.client.tokenize(
        values[given],
        add_special_tokens=values.get("add_special_tokens", True),
        template_options=values.get("chat_template_kwargs"),
        tools=values.get("tools"),
    )


async def detokenize(call: Call) -> ASGIApp:
    """Return the text of token ids, as `prompt` and as `content`."""
    values = (await call.fields(DETOKENIZE_RULES, "tokens")).values
    await checked_model(call, values.get("model"))
    text = ""
    if values["tokens"]:
        skip = values.get("skip_special_tokens", False)
        work = call.client.detokenize(values["tokens"], skip_special_tokens=skip)
        try:
            text = await unless_disconnected(call.request, work)
        except RequestFailed as error:
            if not str(error).startswith("token_ids "):
                raise
            raise bad_request(str(error).replace("token_ids", "tokens", 1), "tokens") from None
    return call.json({"prompt": text, "content": text})


async def apply_template(call: Call) -> ASGIApp:
    """Return the text that the model's chat template makes of messages."""
    values: dict[str, Any] = (await call.fields(TEMPLATE_RULES, "messages")).values
    await checked_model(call, values.get("model"))
    work = call.client.apply_chat_template(
        values["messages"],
        template_options=values.get("chat_template_kwargs"),
        tools=values.get("tools"),
        documents=values.get("documents"),
    )
    return call.json({"prompt": await unless_disconnected(call.request, work)})
