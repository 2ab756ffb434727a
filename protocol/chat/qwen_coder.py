"""Calls as Qwen3-Coder writes them: `<tool_call><function=f><parameter=p>value</parameter></function></tool_call>`.

A value is plain text. The tool's schema says whether it is a string; anything else is read as JSON if it can be.
"""

import json
import re
from collections.abc import Callable

from mgpu.protocol.chat.json_scanner import BrokenJson
from mgpu.protocol.chat.machine import Found, Machine, held_chars

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_MAX_NAME_CHARS = 256
_NAME = re.compile(r"[^<>\s]*")


class QwenCoder(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._function = ""
        self._seen: set[str] = set()
        """Parameters that have come."""
        self._value: list[str] = []
        """Text of a value that is not a string."""
        self._is_string = False

    def _outside(self) -> bool:
        return self._pass_content((BEGIN, _FUNCTION), self._begin_function)

    def _begin_function(self) -> bool:
        """Read the name of the function; its marker may be the one with which the call began."""
        if self._found.marker == _FUNCTION:
            return self._read_name(self._begin_call)
        return self._expect({_FUNCTION: self._read_function})

    def _read_function(self) -> bool:
        return self._read_name(self._begin_call)

    def _begin_call(self, name: str) -> None:
        self._found.begin(name)
        self._found.arguments("{")
        self._function, self._state = name, self._inside
        self._seen.clear()

    def _inside(self) -> bool:
        return self._expect({_PARAMETER: self._read_parameter, _FUNCTION_END: self._end_call})

    def _read_parameter(self) -> bool:
        return self._read_name(self._begin_value)

    def _begin_value(self, name: str) -> None:
        if name in self._seen:
            raise BrokenJson("a parameter comes twice")
        self._is_string = self._found.tools.property_of(self._function, name).get("type") == "string"
        self._found.arguments((", " if self._seen else "") + json.dumps(name, ensure_ascii=False) + ": ")
        if self._is_string:
            self._found.arguments('"')
        self._seen.add(name)
        self._value.clear()
        self._state = self._skip_line_break

    def _skip_line_break(self) -> bool:
        if not self._buffer and not self._has_ended:
            return False
        if self._buffer.startswith("\n"):
            self._take_call(1)
        self._state = self._read_value
        return True

    def _read_value(self) -> bool:
        """Pass a string on as it comes, without the line break at its end. Hold any other value."""
        end = self._buffer.find(_PARAMETER_END)
        if end < 0:
            if self._has_ended:
                return self._give_up()
            held = held_chars(self._buffer, ("\n" + _PARAMETER_END, _PARAMETER_END))
            self._add_value(self._buffer[: len(self._buffer) - held])
            self._take_call(len(self._buffer) - held)
            return False
        self._add_value(self._buffer[:end].removesuffix("\n"))
        self._take_call(end + len(_PARAMETER_END))
        self._found.arguments('"' if self._is_string else _json_of("".join(self._value)))
        self._state = self._inside
        return True

    def _give_up(self) -> bool:
        """Pass on all that is left as content: a value that never ends may hold any number of markers."""
        rest, self._buffer = self._found.broken() + self._buffer, ""
        self._found.content(rest)
        self._state = self._outside
        return False

    def _add_value(self, text: str) -> None:
        if self._is_string:
            self._found.arguments(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)

    def _end_call(self) -> bool:
        self._found.arguments("}")
        self._found.complete()
        self._state = self._after
        return True

    def _after(self) -> bool:
        if not self._skips_space(of_call=False) or self._may_begin(END):
            return False
        if self._buffer.startswith(END):
            self._taken(len(END))
        self._state = self._outside
        return True

    def _expect(self, states: dict[str, Callable[[], bool]]) -> bool:
        """Skip spaces and one of the markers, whose state follows."""
        if not self._skips_space():
            return False
        for marker, state in states.items():
            if self._buffer.startswith(marker):
                self._take_call(len(marker))
                self._state = state
                return True
        if any(map(self._may_begin, states)):
            return False
        return self._break()

    def _read_name(self, then: Callable[[str], None]) -> bool:
        """Read a name up to `>`."""
        name = _NAME.match(self._buffer)
        end = name.end() if name else 0
        if end > _MAX_NAME_CHARS or (end == len(self._buffer) and self._has_ended):
            return self._break()
        if end == len(self._buffer):
            return False
        if self._buffer[end] != ">" or end == 0:
            return self._break()
        text = self._buffer[:end]
        self._take_call(end + 1)
        try:
            then(text)
        except BrokenJson:
            return self._break()
        return True


def _json_of(text: str) -> str:
    """Return the JSON of a value: the text itself if it is JSON, else a string."""
    try:
        value = json.dumps(json.loads(text, parse_constant=_refuse), ensure_ascii=False, allow_nan=False)
        value.encode()
        return value
    except (ValueError, RecursionError):  # also of a number too large, or half of a surrogate pair
        return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(f"JSON has no {name}")
