"""Render chat messages with the model's own Jinja template, in a sandbox with limits on time and output.

The template comes from the model's folder and the messages from a client: neither may run code, loop for ever or fill
the memory. The environment follows transformers (trim_blocks, lstrip_blocks, loop controls, tojson, strftime_now, …).
"""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 8 << 20
TIME_LIMIT_S = 2.0
MAX_REPEATED = 1 << 16
"""Most characters or items in the result of ``*`` on a text or list."""
_WIDE_FORMAT = re.compile(r"\d{4}|\*")


class ChatTemplateError(ValueError):
    """The messages cannot be rendered."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """What a template makes a prompt of."""

    messages: tuple[dict[str, object], ...]
    tools: tuple[dict[str, object], ...] | None = None
    documents: tuple[dict[str, object], ...] | None = None
    options: dict[str, object] | None = None
    """Further variables of the template."""


class _Generation(Extension):
    """Accept ``{% generation %}`` blocks, which only mark text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses operators with small operands and huge results: the sandbox itself does not limit memory."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and max(_repeated(left, right), _repeated(right, left)) > MAX_REPEATED:
            raise ChatTemplateError("the chat template repeats a text or list too often")
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 64):
            raise ChatTemplateError("the chat template uses ** with an exponent above 64")
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise ChatTemplateError("the chat template formats with a width of more than three digits")
        return super().call_binop(context, operator, left, right)


def _repeated(items: object, times: object) -> int:
    return len(items) * times if isinstance(items, (str, list, tuple)) and isinstance(times, int) else 0


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], time_limit_s: float = TIME_LIMIT_S) -> None:
        """ChatTemplateError when the source is not a template."""
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARS}"
            )
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja's own, and those of Python's compiler: `break` without a loop, deep nesting
            raise ChatTemplateError(f"the model's chat template is not valid: {str(error)[:300]}") from None
        self._special_tokens = dict(special_tokens)
        self._time_limit_s = time_limit_s

    def render(self, chat: ChatPrompt) -> str:
        """Return the prompt for an answer to ``chat``. ChatTemplateError with the template's own complaint."""
        values = {
            **self._special_tokens,
            **(chat.options or {}),
            "messages": [dict(message) for message in chat.messages],
            "add_generation_prompt": True,
            "tools": list(chat.tools) if chat.tools else None,
            "documents": list(chat.documents) if chat.documents else None,
        }
        try:
            with _Deadline(self._time_limit_s):
                return self._collect(values)
        except ChatTemplateError:
            raise
        except Exception as error:  # the expressions of a template can raise anything
            raise ChatTemplateError(f"the chat template refuses these messages: {str(error)[:300]}") from None

    def _collect(self, values: Mapping[str, object]) -> str:
        parts: list[str] = []
        total = 0
        for part in self._template.generate(values):
            total += len(part)
            if total > MAX_OUTPUT_CHARS:
                raise ChatTemplateError(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters")
            parts.append(part)
        return "".join(parts)


class _Deadline:
    """Raise inside the block when its time is over: a trace function looks at the clock at every line."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._previous: Any = None

    def __enter__(self) -> None:
        end = time.monotonic() + self._seconds

        def trace(frame: FrameType, event: str, arg: object) -> Callable[..., Any]:
            if time.monotonic() > end:
                raise ChatTemplateError(f"the chat template ran for more than {self._seconds:g} s")
            return trace

        self._previous = sys.gettrace()
        sys.settrace(trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML signs; prompts want the plain text (as transformers does).
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=min(indent, 8) if indent else None, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
