"""The output of one of OpenAI's responses: its items, whole or as the events that build them one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from mgpu.orchestrator.http.requests.logprobs import MessageLogprobs
from mgpu.protocol.client.requests.results import Completion, Piece, ToolCallPart

Body = dict[str, Any]
NewId = Callable[[str], str]
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass(slots=True)
class _Item:
    """One item and its text so far: of a call the arguments."""

    kind: str
    id: str
    index: int
    call_id: str = ""
    name: str = ""
    texts: list[str] = field(default_factory=list, kw_only=True)
    logprobs: list[Body] = field(default_factory=list, kw_only=True)
    """Of a message, if they were asked for."""

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def body(self, status: str) -> Body:
        """Return the item; one that is in progress has no content yet."""
        common = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**common, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [] if status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**common, "summary": [], "content": content}
        return {**common, "role": "assistant", "content": content}

    def part(self) -> Body:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*self.logprobs]}


def output_of(completion: Completion, new_id: NewId) -> list[Body]:
    """Return the items of a whole answer: reasoning, text, calls. The last one is incomplete if it was cut."""
    found: list[_Item] = []

    def add(kind: str, text: str, *call: str) -> None:
        found.append(_Item(kind, new_id(_PREFIXES[kind]), len(found), *call, texts=[text]))

    if completion.reasoning:
        add("reasoning", completion.reasoning)
    if completion.text or not (completion.tool_calls or completion.reasoning):
        add("message", completion.text)
    for each in completion.tool_calls:
        add("function_call", each.arguments_text, each.id, each.name)
    last = "incomplete" if completion.finish_reason == "length" else "completed"
    return [item.body(last if item is found[-1] else "completed") for item in found]


class OutputEvents:
    """The events of the items of a stream. One item is open at a time."""

    def __init__(self, new_id: NewId, event: Callable[[str, Mapping[str, Any]], bytes]) -> None:
        self.output: list[Body] = []
        """The items that have ended, but for calls that turned out to be none."""
        self._new_id = new_id
        self._event = event
        self._open: _Item | None = None
        self._count = 0
        self._logprobs = MessageLogprobs()

    def of(self, piece: Piece) -> bytes:
        """Return the events of a piece."""
        # Parts of a call that has begun in an earlier piece come first: the call ends before the text.
        begun = list(takewhile(lambda part: not part.id, piece.tool_calls))
        data, logprobs = self._calls(begun), self._logprobs.of(piece)
        if piece.reasoning:
            data += self._begin_unless_open("reasoning") + self._delta("reasoning_text", piece.reasoning)
        if piece.text:
            data += self._begin_unless_open("message") + self._delta("output_text", piece.text, logprobs)
        return data + self._calls(piece.tool_calls[len(begun) :])

    def end(self, reason: str) -> bytes:
        """End the last item; an answer has one at least."""
        head = b"" if self._open or self.output else self._begin("message")
        return head + self._close("incomplete" if reason == "length" else "completed")

    def _calls(self, parts: Sequence[ToolCallPart]) -> bytes:
        return b"".join(map(self._call, parts))

    def _call(self, part: ToolCallPart) -> bytes:
        if part.is_broken:
            return self._void()
        head = self._begin("function_call", part.id, part.name) if part.id else b""
        return head + (self._delta("function_call_arguments", part.arguments) if part.arguments else b"")

    def _begin_unless_open(self, kind: str) -> bytes:
        return b"" if self._open is not None and self._open.kind == kind else self._begin(kind)

    def _begin(self, kind: str, *call: str) -> bytes:
        closed = self._close("completed")
        item = self._open = _Item(kind, self._new_id(_PREFIXES[kind]), self._count, *call)
        self._count += 1
        data = self._event("output_item.added", {"output_index": item.index, "item": item.body("in_progress")})
        if kind != "function_call":
            data += self._event("content_part.added", {**self._place(item), "part": item.part()})
        return closed + data

    def _delta(self, name: str, text: str, logprobs: list[Body] | None = None) -> bytes:
        """Add text to the open item; ``logprobs``: those of a message, None for other items."""
        if (item := self._open) is None:
            return b""
        item.texts.append(text)
        item.logprobs += logprobs or ()
        more = {} if logprobs is None else {"logprobs": logprobs}
        return self._event(f"{name}.delta", {**self._place(item), "delta": text, **more})

    def _close(self, status: str) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        body, place, text = item.body(status), self._place(item), item.text
        self.output.append(body)
        if item.kind == "function_call":
            done = self._event("function_call_arguments.done", {**place, "name": item.name, "arguments": text})
        elif item.kind == "reasoning":
            done = self._event("reasoning_text.done", {**place, "text": text})
        else:
            done = self._event("output_text.done", {**place, "text": text, "logprobs": item.logprobs})
        if item.kind != "function_call":
            done += self._event("content_part.done", {**place, "part": item.part()})
        return done + self._event("output_item.done", {"output_index": item.index, "item": body})

    def _void(self) -> bytes:
        """End a call that does not parse after all. Its text follows as text of the answer."""
        if self._open is None or self._open.kind != "function_call":
            return b""
        item, self._open = self._open, None
        return self._event("output_item.done", {"output_index": item.index, "item": item.body("incomplete")})

    def _place(self, item: _Item) -> Body:
        place: Body = {"item_id": item.id, "output_index": item.index}
        return place if item.kind == "function_call" else {**place, "content_index": 0}
