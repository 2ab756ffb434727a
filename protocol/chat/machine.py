"""What the parsers of tool calls have in common.

Theory. A parser is a machine of a few states. Each state is a method that takes what it understands from the front of
the buffer and returns True, or returns False if it must see more text first. What a state takes depends on the text
alone, never on how the text was cut into pieces. So the events of all pieces, joined, are those of the whole text.

A call is announced as soon as its name is known, and its arguments are passed on as they come. If what follows does
not parse, the call is broken: its marker becomes content, and the machine goes on right after the marker. Spaces beside
a call are dropped.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

from mgpu.protocol.chat.events import CallArguments, CallBegin, CallBroken, CallEnd, Content, Event, Reasoning
from mgpu.protocol.chat.json_scanner import BrokenJson
from mgpu.protocol.chat.tools import OfferedTools

_MAX_HELD_SPACES = 1024
_MAX_BROKEN = 128


class Scanner(Protocol):
    """Follows JSON while it arrives."""

    is_complete: bool

    def scan(self, text: str) -> int:
        """Return the end of what belongs to it. BrokenJson where it is not valid."""


def new_call_id() -> str:
    """Return an id that all chat templates take: some insist on nine letters and digits."""
    return secrets.token_hex(5)[:9]


class Found:
    """Collects the events of one answer."""

    def __init__(self, tools: OfferedTools, most_calls: int = 128, new_id: Callable[[], str] = new_call_id) -> None:
        self.tools = tools
        self._most_calls = most_calls
        self._new_id = new_id
        self._events: list[Event] = []
        self._spaces = ""
        """Spaces at the end of the content so far; dropped if a call follows."""
        self._raw: list[str] = []
        """All text of the call that is read."""
        self._index = -1
        self._num_broken = 0
        """Calls that were announced and broke; they take no place of those that may come."""
        self._is_open = False
        """A call has been announced and not ended."""
        self._follows_call = False
        """No content has come since a call."""

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self._events = self._events, []
        return events

    def content(self, text: str) -> None:
        text = self._spaces + text
        if self._follows_call:
            text = text.lstrip()
        end = max(len(text.rstrip()), len(text) - _MAX_HELD_SPACES)
        self._spaces = text[end:]
        self._add_content(text[:end])

    def plain(self, text: str) -> None:
        """Add content where there can be no calls."""
        self._add_content(text)

    def reasoning(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))

    def end(self) -> None:
        """Pass on what was held back: nothing follows."""
        spaces, self._spaces = self._spaces, ""
        self._add_content(spaces)

    def _add_content(self, text: str) -> None:
        if text:
            self._follows_call = False
            self._events.append(Content(text))

    # ------------------------------------------------------------------ calls

    def raw(self, text: str) -> None:
        """Note text that belongs to a call, first the marker with which it begins. If it breaks, it is content."""
        self._raw.append(text)

    @property
    def marker(self) -> str:
        """The marker with which the call that is read began."""
        return self._raw[0]

    def begin(self, name: str, call_id: str = "") -> None:
        """Announce a call, with a new id if it has none. BrokenJson if no such tool is offered."""
        if name not in self.tools:
            raise BrokenJson("there is no such tool")
        self._index += 1
        self._is_open = True
        self._add_call(CallBegin(self._index, call_id or self._new_id(), name))

    def _add_call(self, event: Event) -> None:
        if self._index - min(self._num_broken, _MAX_BROKEN) < self._most_calls:
            self._events.append(event)

    def arguments(self, text: str) -> None:
        if text:
            self._add_call(CallArguments(self._index, text))

    def complete(self) -> None:
        """End the call that was announced."""
        self._is_open, self._spaces, self._follows_call = False, "", True
        self._raw.clear()
        self._add_call(CallEnd(self._index))

    def broken(self) -> str:
        """Turn the marker of the call into content, and return the rest of its text: it may hold another call."""
        if self._is_open:
            self._is_open = False
            self._add_call(CallBroken(self._index))
            self._num_broken += 1
        marker, rest = self._raw[0], "".join(self._raw[1:])
        self._raw.clear()
        self.content(marker)
        return rest


class Machine:
    """A parser of tool calls; `_state` is its state."""

    def __init__(self, found: Found) -> None:
        self._found = found
        self._buffer = ""
        self._has_ended = False
        self._state: Callable[[], bool] = self._outside

    def push(self, text: str) -> None:
        """Take the next part of the answer."""
        self._buffer += text
        while self._state():
            pass

    def finish(self) -> None:
        """Take the end of the answer. What is incomplete becomes content."""
        self._has_ended = True
        while self._state():
            pass
        assert not self._buffer
        self._found.end()

    def _outside(self) -> bool:
        raise NotImplementedError

    def _taken(self, length: int) -> str:
        """Take so many characters from the buffer."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        return text

    def _take_call(self, length: int) -> None:
        self._found.raw(self._taken(length))

    def _break(self) -> bool:
        """End the call as content, and look for calls after its marker."""
        self._buffer = self._found.broken() + self._buffer
        self._state = self._outside
        return True

    def _follow(self, scanner: Scanner, then: Callable[[], bool], are_arguments: bool = False) -> bool:
        """Take what belongs to the JSON of a call; ``then`` is the state after its end.

        ``are_arguments``: pass it on as such. Else the scanner does so itself.
        """
        try:
            end = scanner.scan(self._buffer)
        except BrokenJson:
            return self._break()
        if are_arguments:
            self._found.arguments(self._buffer[:end])
        self._take_call(end)
        if scanner.is_complete:
            self._found.complete()
            self._state = then
            return True
        return self._has_ended and self._break()

    def _pass_content(self, markers: Sequence[str], then: Callable[[], bool]) -> bool:
        """Pass on what comes before the first marker. After the marker, which is part of a call, do ``then``."""
        at, marker = first_of(self._buffer, markers)
        if marker:
            self._found.content(self._taken(at))
            self._take_call(len(marker))
            self._state = then
            return True
        held = 0 if self._has_ended else held_chars(self._buffer, markers)
        self._found.content(self._taken(len(self._buffer) - held))
        return False

    def _skips_space(self, of_call: bool = True) -> bool:
        """Take spaces. Return False if more may follow."""
        rest = self._buffer.lstrip()
        space = self._taken(len(self._buffer) - len(rest))
        (self._found.raw if of_call else self._found.content)(space)
        return bool(rest) or self._has_ended

    def _skip_end(self, marker: str, then: Callable[[], bool]) -> bool:
        """Skip spaces and the marker behind a call, which may be missing; go on with ``then``."""
        if not self._skips_space(of_call=False) or self._may_begin(marker):
            return False
        if self._buffer.startswith(marker):
            self._taken(len(marker))
        self._state = then
        return True

    def _may_begin(self, marker: str) -> bool:
        """Return True if the buffer is the beginning of a marker, which may go on."""
        return not self._has_ended and len(self._buffer) < len(marker) and marker.startswith(self._buffer)


def first_of(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Return where the first of several markers is, and which; an empty one if there is none."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    return (min(found)[0], min(found)[2]) if found else (len(text), "")


def held_chars(text: str, markers: Sequence[str]) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(marker.startswith(text[start:]) for marker in markers):
            return len(text) - start
    return 0
