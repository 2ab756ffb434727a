"""Calls as Hermes and Qwen write them: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`, any number of them."""

from mgpu.protocol.chat.call_object import CallObject
from mgpu.protocol.chat.machine import Found, Machine

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._object = CallObject(found)

    def _outside(self) -> bool:
        return self._pass_content((BEGIN,), self._begin_object)

    def _begin_object(self) -> bool:
        self._object = CallObject(self._found)
        self._state = self._inside
        return True

    def _begin_bare_object(self) -> bool:
        """Begin a call whose marker is its bracket."""
        self._object = CallObject(self._found)
        self._object.scan("{")
        self._take_call(1)
        self._state = self._inside
        return True

    def _inside(self) -> bool:
        return self._follow(self._object, self._after)

    def _after(self) -> bool:
        """Skip the end marker, which may be missing. Another object may come before it."""
        if not self._skips_space(of_call=False) or self._may_begin(END):
            return False
        if self._buffer.startswith("{"):
            return self._begin_bare_object()
        if self._buffer.startswith(END):
            self._taken(len(END))
        self._state = self._outside
        return True
