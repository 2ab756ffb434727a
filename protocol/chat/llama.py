"""Calls as Llama 3 writes them: an answer that is `{"name": "f", "parameters": {…}}`, several apart by `;`.

The token `<|python_tag|>` may come before it. After other text, an object is a call only behind that token.
"""

from mgpu.protocol.chat.call_object import CallObject
from mgpu.protocol.chat.machine import Found, Machine

TAG, TAG_END = "<|python_tag|>", "<|eom_id|>"
_SEPARATORS = ";,"


class Llama(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._state = self._start
        self._object = CallObject(found)

    def _start(self) -> bool:
        """Look for a call at the beginning of the answer."""
        if not self._skips_space(of_call=False) or not self._buffer:
            return False
        self._state = self._begin_object if self._buffer.startswith("{") else self._outside
        return True

    def _outside(self) -> bool:
        return self._pass_content((TAG,), self._after_tag)

    def _after_tag(self) -> bool:
        if not self._skips_space():
            return False
        self._state = self._read_object
        self._object = CallObject(self._found)
        return True

    def _begin_object(self) -> bool:
        """Begin a call whose marker is its bracket."""
        self._object = CallObject(self._found)
        self._object.scan("{")
        self._take_call(1)
        self._state = self._read_object
        return True

    def _read_object(self) -> bool:
        return self._follow(self._object, self._after)

    def _after(self) -> bool:
        """Look for another call, behind a separator or none."""
        if not self._skips_space(of_call=False) or not self._buffer:
            return False
        if self._buffer.startswith("{"):
            self._state = self._begin_object
            return True
        if self._buffer[0] in _SEPARATORS:
            following = self._buffer[1:].lstrip()
            if not following and not self._has_ended:
                return False
            if following.startswith(("{", TAG[:1])):
                self._taken(len(self._buffer) - len(following))
                return True
        self._state = self._outside
        return True
