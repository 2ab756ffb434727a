"""Calls as Mistral writes them: `[TOOL_CALLS]` before a list of objects, or before each `name[ARGS]{…}`."""

import re

from mgpu.protocol.chat.call_object import CallObject
from mgpu.protocol.chat.json_scanner import JsonScanner
from mgpu.protocol.chat.machine import Found, Machine

BEGIN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[a-zA-Z0-9_-]*")
_MAX_NAME_CHARS = 64


class Mistral(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._object = CallObject(found)
        self._arguments = JsonScanner()
        self._name = ""
        self._in_list = False

    def _outside(self) -> bool:
        return self._pass_content((BEGIN,), self._begin_calls)

    def _begin_calls(self) -> bool:
        if not self._skips_space():
            return False
        self._in_list = self._buffer.startswith("[")
        if self._in_list:
            self._take_call(1)
        self._state = self._begin_object if self._in_list or self._buffer.startswith("{") else self._read_name
        return True

    # ------------------------------------------------------ objects, in a list

    def _begin_object(self) -> bool:
        self._object = CallObject(self._found)
        self._state = self._read_object
        return True

    def _read_object(self) -> bool:
        return self._follow(self._object, self._after_object if self._in_list else self._outside)

    def _after_object(self) -> bool:
        if not self._skips_space(of_call=False) or not self._buffer:
            return False
        mark = self._buffer[0]
        if mark == ",":
            self._take_call(1)
            self._state = self._begin_object
        else:
            if mark == "]":
                self._taken(1)
            self._state = self._outside
        return True

    # ------------------------------------------------------ name and arguments

    def _read_name(self) -> bool:
        name = _NAME.match(self._buffer)
        end = name.end() if name else 0
        if end == len(self._buffer) and end <= _MAX_NAME_CHARS and not self._has_ended:
            return False
        self._name = self._buffer[:end]
        if not 0 < end <= _MAX_NAME_CHARS or self._name not in self._found.tools:
            return self._break()
        self._take_call(end)
        self._state = self._after_name
        return True

    def _after_name(self) -> bool:
        """Skip the marker of the arguments, and a call's id before it."""
        if not self._skips_space() or self._may_begin(ARGS) or self._may_begin(CALL_ID):
            return False
        if self._buffer.startswith(CALL_ID):
            end = self._buffer.find("[", 1, _MAX_NAME_CHARS)
            if end < 0:
                return (self._has_ended or len(self._buffer) >= _MAX_NAME_CHARS) and self._break()
            self._take_call(end)
            return True
        if self._buffer.startswith(ARGS):
            self._take_call(len(ARGS))
        self._state = self._begin_arguments
        return True

    def _begin_arguments(self) -> bool:
        if not self._skips_space():
            return False
        if not self._buffer.startswith("{"):
            return self._break()
        self._found.begin(self._name)
        self._arguments = JsonScanner()
        self._state = self._read_arguments
        return True

    def _read_arguments(self) -> bool:
        return self._follow(self._arguments, self._outside, are_arguments=True)
