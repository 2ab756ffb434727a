"""Calls as Llama 3.2 and 4 write them: an answer that is a list of Python calls, `[f(a=1), g(b='x')]`.

The list is read as a syntax tree of literals. Nothing of it is run.
"""

import ast
import json
import re

from mgpu.protocol.chat.json_scanner import MAX_DEPTH, BrokenJson
from mgpu.protocol.chat.machine import Found, Machine

BEGIN, END = "<|python_start|>", "<|python_end|>"
_MAX_CALL_CHARS = 1 << 20
_CALL_BEGIN = re.compile(r"\s{0,64}[a-zA-Z0-9_-]{1,64} ?\(")
_MAYBE_CALL_BEGIN = re.compile(r"\s{0,64}(?:[a-zA-Z0-9_-]{1,64} ?)?")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_NAMES = {"true": True, "false": False, "null": None, "none": None}


class Pythonic(Machine):
    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self._state = self._start
        self._scan = _CallScan()
        self._text: list[str] = []
        """Of the call that is read."""

    def _start(self) -> bool:
        """Look for a list at the beginning of the answer."""
        if not self._skips_space(of_call=False) or not self._buffer:
            return False
        self._state = self._begin_list if self._buffer.startswith("[") else self._outside
        return True

    def _outside(self) -> bool:
        return self._pass_content((BEGIN,), self._after_begin)

    def _after_begin(self) -> bool:
        if not self._skips_space():
            return False
        if not self._buffer.startswith("["):
            return self._break()
        return self._begin_list()

    def _begin_list(self) -> bool:
        self._take_call(1)
        self._begin_call()
        return True

    def _begin_call(self) -> None:
        self._scan, self._text = _CallScan(), []
        self._state = self._read_head

    def _read_head(self) -> bool:
        """Look whether a name and a bracket follow, so that other lists are not held."""
        if _CALL_BEGIN.match(self._buffer):
            self._state = self._read_call
            return True
        if not self._has_ended and _MAYBE_CALL_BEGIN.fullmatch(self._buffer):
            return False
        return self._break()

    def _read_call(self) -> bool:
        try:
            end = self._scan.scan(self._buffer)
            self._text.append(self._buffer[:end])
            self._take_call(end)
            if self._scan.is_complete:
                return self._end_call()
        except BrokenJson:
            return self._break()
        return self._has_ended and self._break()

    def _end_call(self) -> bool:
        name, arguments = parse_call("".join(self._text))
        self._found.begin(name)
        self._found.arguments(arguments)
        self._found.complete()
        self._state = self._after
        return True

    def _after(self) -> bool:
        if not self._skips_space(of_call=False) or not self._buffer:
            return False
        mark = self._buffer[0]
        if mark == ",":
            self._take_call(1)
            self._begin_call()
            return True
        if mark == "]":
            self._taken(1)
            self._state = self._after_list
        else:
            self._state = self._outside
        return True

    def _after_list(self) -> bool:
        return self._skip_end(END, self._outside)


class _CallScan:
    """Finds the bracket that ends a call."""

    def __init__(self) -> None:
        self.is_complete = False
        self._stack: list[str] = []
        self._quote = ""
        self._escaped = False
        self._count = 0

    def scan(self, text: str) -> int:
        """Return the end of what belongs to the call. BrokenJson where the brackets do not fit."""
        for at, mark in enumerate(text):
            self._count += 1
            if self._count > _MAX_CALL_CHARS:
                raise BrokenJson("the call is too long")
            if self._quote:
                self._in_string(mark)
            elif mark in "'\"":
                self._quote = mark
            elif mark in _CLOSING:
                self._stack.append(_CLOSING[mark])
                if len(self._stack) > MAX_DEPTH:
                    raise BrokenJson("the call is nested too deeply")
            elif mark in ")]}":
                if not self._stack or self._stack.pop() != mark:
                    raise BrokenJson("the brackets do not fit")
                if not self._stack:
                    self.is_complete = True
                    return at + 1
        return len(text)

    def _in_string(self, mark: str) -> None:
        if self._escaped:
            self._escaped = False
        elif mark == "\\":
            self._escaped = True
        elif mark == self._quote:
            self._quote = ""


def parse_call(text: str) -> tuple[str, str]:
    """Return the name of a call and its arguments as JSON. BrokenJson if it has anything but keywords and literals."""
    try:
        # Python's names have no hyphens, so the tool's name is not part of the tree.
        name, _, rest = text.strip().partition("(")
        [call] = [ast.parse(f"_({rest}", mode="eval").body]
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise BrokenJson("the call is not a call with keywords")
        values: dict[str, object] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in values:
                raise BrokenJson("a keyword is missing or comes twice")
            values[keyword.arg] = _literal(keyword.value)
        arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        arguments.encode()  # half of a surrogate pair is no text
        return name.strip(), arguments
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BrokenJson(f"the call is not Python: {type(error).__name__}") from None


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    raise BrokenJson("a value is no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise BrokenJson("a key is not a string")
