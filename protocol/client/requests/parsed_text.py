"""The text of one choice as the caller gets it: as it is, or apart as text, reasoning and tool calls."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from mgpu.protocol.chat.answer_parser import AnswerParser, ParsedAnswer
from mgpu.protocol.chat.events import CallArguments, CallBegin, CallBroken, Content, Event, Reasoning
from mgpu.protocol.chat.formats import REASONING_FORMAT_NAMES, TOOL_FORMATS, ChatFormat
from mgpu.protocol.chat.tools import OfferedTools
from mgpu.protocol.client.requests.results import ToolCall, ToolCallPart
from mgpu.protocol.front.chat_messages import MAX_CALLS
from mgpu.protocol.front.server_messages import Accepted


class TextPart(NamedTuple):
    """What a part of the text has brought."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()


class ParsedText:
    """The text of one choice so far."""

    def __init__(self, parser: AnswerParser | None, *, is_kept: bool = True) -> None:
        """Without a parser the text is passed on as it is, and kept if ``is_kept``."""
        self._is_kept = is_kept
        self._parser = parser
        self._plain: list[str] = []
        self._parsed = ParsedAnswer()

    def add(self, text: str, is_last: bool) -> TextPart:
        """Add a part of the text; ``is_last``: nothing follows."""
        if self._parser is None:
            if self._is_kept:
                self._plain.append(text)
            return TextPart(text)
        events = self._parser.push(text)
        if is_last:
            events += self._parser.finish()
        self._parsed.add(events)
        return _part_of(events)

    @property
    def has_calls(self) -> bool:
        """True if a call is complete."""
        return bool(self._parsed.calls())

    def so_far(self, has_ended: bool) -> tuple[str, str, tuple[ToolCall, ...]]:
        """Return text, reasoning and calls. What was held back of a text that goes on is part of them."""
        if self._parser is None:
            return "".join(self._plain), "", ()
        parsed = self._parsed
        if not has_ended:
            parsed = copy.deepcopy(parsed)
            parsed.add(copy.deepcopy(self._parser).finish())
        calls = [
            ToolCall(each.call_id, each.name, json.loads(each.arguments), each.arguments) for each in parsed.calls()
        ]
        return "".join(parsed.content), "".join(parsed.reasoning), tuple(calls)


def parser_for(request: Mapping[str, object], accepted: Accepted | None) -> AnswerParser | None:
    """Return the parser of an answer to a chat; None if its format has nothing to be found."""
    if accepted is None or not request.get("show_markers"):
        return None
    # A newer server may have formats that this client does not know: their text is passed on as it is.
    tools = accepted.tool_format if accepted.tool_format in TOOL_FORMATS else ""
    reasoning = accepted.reasoning_format if accepted.reasoning_format in REASONING_FORMAT_NAMES[2:] else ""
    may_call = request.get("tool_choice") != "none"
    offered = OfferedTools(cast("Sequence[Mapping[str, Any]]", request.get("tools") or ()) if may_call else ())
    if not reasoning and not (tools and offered):
        return None
    most_calls = MAX_CALLS if request.get("parallel_tool_calls", True) else 1
    return AnswerParser(ChatFormat(tools or "", reasoning or ""), offered, bool(accepted.in_reasoning), most_calls)


def _part_of(events: Sequence[Event]) -> TextPart:
    text = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: list[ToolCallPart] = []
    for event in events:
        if isinstance(event, CallBegin):
            calls.append(ToolCallPart(event.index, event.call_id, event.name, ""))
        elif isinstance(event, CallArguments):
            calls.append(ToolCallPart(event.index, "", "", event.text))
        elif isinstance(event, CallBroken):
            calls.append(ToolCallPart(event.index, "", "", "", is_broken=True))
    return TextPart(text, reasoning, tuple(calls))
