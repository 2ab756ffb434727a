"""Tools for chat templates that do not know them: they stand in the system message, calls and results in the turns.

The form is that of Hermes, which the parser `hermes` reads.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mgpu.orchestrator.gateway.text.chat_template import ChatPrompt

_KNOWS_TOOLS = ("tools", "tool_calls")
_HOW = (
    "You can call these functions. To call one, write <tool_call> and </tool_call> around a JSON object with its name "
    'and arguments: <tool_call>\n{"name": "…", "arguments": {…}}\n</tool_call>'
)


def knows_tools(template: str) -> bool:
    """Return whether a chat template does anything with tools."""
    return any(word in template for word in _KNOWS_TOOLS)


def with_generic_tools(chat: ChatPrompt, template: str) -> ChatPrompt:
    """Return a chat without anything that ``template`` would leave out."""
    has_tools = bool(chat.tools) or any("tool_calls" in message for message in chat.messages)
    if not has_tools or knows_tools(template):
        return chat
    messages = [_plain(message) for message in chat.messages]
    if chat.tools:
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in chat.tools)
        text = f"{system}\n\n{_HOW}\n<tools>\n{listed}\n</tools>".strip()
        messages.insert(0, {"role": "system", "content": text})
    return replace(chat, messages=tuple(messages), tools=None)


def _plain(message: Mapping[str, object]) -> dict[str, object]:
    """Return a message of plain text."""
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = cast("Sequence[Mapping[str, Any]]", message.get("tool_calls", ()))
    if not calls:
        return dict(message)
    texts = [f"<tool_call>\n{json.dumps(_call(each), ensure_ascii=False)}\n</tool_call>" for each in calls]
    return {"role": "assistant", "content": "\n".join([str(message["content"]), *texts]).strip()}


def _call(call: Mapping[str, Any]) -> dict[str, object]:
    return {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
