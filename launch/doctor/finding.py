"""What a check found, and how it is printed."""

import textwrap
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]
WIDTH = 80
_LABEL = 16


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do, if something is to be done."""

    level: Level
    check: str
    text: str
    advice: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding("ok", check, text)


def warn(check: str, text: str, advice: str) -> Finding:
    return Finding("warn", check, text, advice)


def fail(check: str, text: str, advice: str) -> Finding:
    return Finding("FAIL", check, text, advice)


def finding_text(finding: Finding) -> str:
    """Return a finding as lines of at most 80 columns."""
    indent = " " * (_LABEL + 6)
    head = f"{finding.level:<4}  {finding.check:<{_LABEL}}"
    lines = textwrap.wrap(finding.text, WIDTH - len(indent), break_on_hyphens=False) or [""]
    text = "\n".join((f"{head}{lines[0]}".rstrip(), *(f"{indent}{line}" for line in lines[1:])))
    if finding.advice:
        text += "\n" + textwrap.fill(
            finding.advice, WIDTH, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ",
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return text
