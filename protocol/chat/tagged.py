"""Calls whose parameters stand between tags, as Qwen3-Coder, GLM, MiniMax and DeepSeek V3.2 write them.

Qwen3-Coder: `<tool_call><function=f><parameter=p>value</parameter></function></tool_call>`
GLM: `<tool_call>f<arg_key>p</arg_key><arg_value>value</arg_value></tool_call>`
MiniMax: `<minimax:tool_call><invoke name="f"><parameter name="p">value</parameter></invoke></minimax:tool_call>`
DeepSeek V3.2: like MiniMax, with `｜DSML｜` in each tag and, behind a parameter's name, `string="true"` or `"false"`

A value is plain text. The tag of its parameter says whether it is a string, else the tool's schema does; anything else
is read as JSON if it can be.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from mgpu.protocol.chat.json_scanner import BrokenJson
from mgpu.protocol.chat.machine import Found, Machine, held_chars

_MAX_NAME_CHARS = 256
_NAME = re.compile(r"[^<>\s\"]*")


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of a format."""

    begin: str
    end: str
    """After the call, or after several."""
    function: str
    """Before the name of the tool; empty if that follows ``begin``."""
    function_name_end: str
    """Empty if anything but a letter of the name ends it."""
    function_end: str
    parameter: str
    parameter_name_end: str
    value: str
    """Between the name of a parameter and its value, if there is such a tag."""
    value_end: str
    string: str = ""
    """Behind the name of a parameter whose value is a string, if the format says so."""
    other: str = ""
    """Behind that of any other."""
    has_lines: bool = False
    """True if a line break after the beginning of a value, and one before its end, belong to the tags."""

    def whole_tags(self) -> tuple[str, ...]:
        """Return the tags that are not parted by a name."""
        tags = (
            self.begin,
            self.end,
            self.function_end,
            self.parameter,
            self.parameter_name_end,
            self.value,
            self.value_end,
        )
        return tuple(tag for tag in tags if re.fullmatch(r"<[^=]*>", tag))


QWEN_CODER = Tags(
    "<tool_call>", "</tool_call>", "<function=", ">", "</function>", "<parameter=", ">", "", "</parameter>",
    has_lines=True,
)  # fmt: skip
GLM = Tags("<tool_call>", "", "", "", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MINIMAX = Tags(
    "<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="', '">', "</invoke>", '<parameter name="', '">', "",
    "</parameter>",
)  # fmt: skip
DEEPSEEK = Tags(
    "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", '<｜DSML｜invoke name="', '">', "</｜DSML｜invoke>",
    '<｜DSML｜parameter name="', '" string="', "", "</｜DSML｜parameter>", string='true">', other='false">',
)  # fmt: skip


class Tagged(Machine):
    def __init__(self, found: Found, tags: Tags) -> None:
        super().__init__(found)
        self._tags = tags
        self._function = ""
        self._seen: set[str] = set()
        """Parameters that have come."""
        self._value: list[str] = []
        """Text of a value that is not a string."""
        self._is_string = False

    def _outside(self) -> bool:
        markers = (self._tags.begin, self._tags.function) if self._tags.function else (self._tags.begin,)
        return self._pass_content(markers, self._begin_function)

    def _begin_function(self) -> bool:
        """Read the name of the function; its marker may be the one with which the call began."""
        if not self._tags.function:
            return self._skips_space() and self._read_function()
        if self._found.marker == self._tags.function:
            return self._read_function()
        return self._expect({self._tags.function: self._read_function})

    def _read_function(self) -> bool:
        return self._read_name(self._tags.function_name_end, self._begin_call)

    def _begin_call(self, name: str) -> None:
        self._found.begin(name)
        self._found.arguments("{")
        self._function, self._state = name, self._inside
        self._seen.clear()

    def _inside(self) -> bool:
        return self._expect({self._tags.parameter: self._read_parameter, self._tags.function_end: self._end_call})

    def _read_parameter(self) -> bool:
        return self._read_name(self._tags.parameter_name_end, self._begin_value)

    def _begin_value(self, name: str) -> None:
        if name in self._seen:
            raise BrokenJson("a parameter comes twice")
        self._found.arguments((", " if self._seen else "") + json.dumps(name, ensure_ascii=False) + ": ")
        self._seen.add(name)
        self._value.clear()
        if self._tags.string:
            self._state = self._expect_kind
        else:
            self._use_kind(self._found.tools.property_of(self._function, name).get("type") == "string")

    def _use_kind(self, is_string: bool) -> None:
        self._is_string = is_string
        if is_string:
            self._found.arguments('"')
        self._state = self._expect_value if self._tags.value else self._skip_line_break

    def _expect_kind(self) -> bool:
        return self._expect({self._tags.string: self._begin_string, self._tags.other: self._begin_other})

    def _begin_string(self) -> bool:
        self._use_kind(True)
        return True

    def _begin_other(self) -> bool:
        self._use_kind(False)
        return True

    def _expect_value(self) -> bool:
        return self._expect({self._tags.value: self._skip_line_break})

    def _skip_line_break(self) -> bool:
        if not self._buffer and not self._has_ended:
            return False
        if self._tags.has_lines and self._buffer.startswith("\n"):
            self._take_call(1)
        self._state = self._read_value
        return True

    def _read_value(self) -> bool:
        """Pass a string on as it comes. Hold any other value."""
        line, tag = "\n" * self._tags.has_lines, self._tags.value_end
        end = self._buffer.find(tag)
        if end < 0:
            if self._has_ended:
                return self._give_up()
            held = held_chars(self._buffer, (line + tag, tag))
            self._add_value(self._buffer[: len(self._buffer) - held])
            self._take_call(len(self._buffer) - held)
            return False
        self._add_value(self._buffer[:end].removesuffix(line))
        self._take_call(end + len(tag))
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
        end = self._tags.end
        if not self._skips_space(of_call=False) or (end and self._may_begin(end)):
            return False
        if end and self._buffer.startswith(end):
            self._taken(len(end))
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

    def _read_name(self, tag: str, then: Callable[[str], None]) -> bool:
        """Read a name and the ``tag`` behind it."""
        name = _NAME.match(self._buffer)
        end = name.end() if name else 0
        rest = self._buffer[end : end + max(1, len(tag))]
        is_cut = not rest or (rest != tag and tag.startswith(rest))
        if end > _MAX_NAME_CHARS or (is_cut and self._has_ended):
            return self._break()
        if is_cut:
            return False
        if (tag and rest != tag) or end == 0:
            return self._break()
        text = self._buffer[:end]
        self._take_call(end + len(tag))
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
