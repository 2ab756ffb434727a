"""Read one answer as content, reasoning and tool calls: piece by piece, and as a whole."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mgpu.protocol.chat.events import (
    CallArguments,
    CallBegin,
    CallBroken,
    Content,
    Event,
    Reasoning,
)
from mgpu.protocol.chat.formats import HARMONY, REASONING_FORMATS, TOOL_FORMATS, ChatFormat
from mgpu.protocol.chat.harmony import Harmony
from mgpu.protocol.chat.machine import Found, Machine, new_call_id
from mgpu.protocol.chat.thinking import ThinkSplitter
from mgpu.protocol.chat.tools import OfferedTools


class AnswerParser:
    """Takes the text of one answer as it comes and returns what it finds."""

    def __init__(
        self,
        chat_format: ChatFormat,
        tools: OfferedTools | None = None,
        in_reasoning: bool = False,
        most_calls: int = 128,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Without ``tools`` there are no calls. ``in_reasoning``: the prompt has begun the reasoning.

        Calls after ``most_calls`` are dropped.
        """
        self._found = Found(tools or OfferedTools(), most_calls, new_id)
        self._machine: Machine | None = None
        self._thinking: ThinkSplitter | None = None
        if HARMONY in (chat_format.tools, chat_format.reasoning):
            self._machine = Harmony(self._found)
            return
        if chat_format.reasoning:
            reasoning = REASONING_FORMATS[chat_format.reasoning]
            self._thinking = ThinkSplitter(reasoning.begin + reasoning.label, reasoning.end, in_reasoning)
        if chat_format.tools and tools:
            self._machine = TOOL_FORMATS[chat_format.tools].machine(self._found)

    def push(self, text: str) -> list[Event]:
        """Take the next part of the text."""
        self._push(*(("", text) if self._thinking is None else self._thinking.push(text)))
        return self._found.take()

    def finish(self) -> list[Event]:
        """Take the end of the text. What is incomplete becomes content."""
        if self._thinking is not None:
            self._push(*self._thinking.push("", has_ended=True))
        if self._machine is not None:
            self._machine.finish()
        return self._found.take()

    def _push(self, reasoning: str, answer: str) -> None:
        self._found.reasoning(reasoning)
        if self._machine is None:
            self._found.plain(answer)
        elif answer:
            self._machine.push(answer)


@dataclass(slots=True)
class ParsedCall:
    call_id: str
    name: str
    arguments: str
    """JSON text of an object."""


@dataclass(slots=True)
class ParsedAnswer:
    """What the events of an answer make together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, tuple[CallBegin, list[str]]] = field(default_factory=dict)

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                self.content.append(event.text)
            elif isinstance(event, Reasoning):
                self.reasoning.append(event.text)
            elif isinstance(event, CallBegin):
                self._calls[event.index] = (event, [])
            elif isinstance(event, CallArguments):
                self._calls[event.index][1].append(event.text)
            elif isinstance(event, CallBroken):
                del self._calls[event.index]

    def calls(self) -> list[ParsedCall]:
        """Return the calls that did not break."""
        return [ParsedCall(begin.call_id, begin.name, "".join(parts)) for begin, parts in self._calls.values()]
