"""Fuzz the HTTP server by its own OpenAPI document: `make fuzz`, or

    python -m bench.http.document_fuzz [--minutes 1] [--url URL] [--save FILE]

schemathesis makes requests that the document allows, and requests that it does not. What counts as a finding: a status
that the document lacks, a 500, an allowed body that is refused, a forbidden one that is answered, an answer that is not
of the type that it says, or one that shows insides. Without ``--url`` the built-in model is served. Needs the packages
of mgpu[compat].
"""

import argparse
import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from bench.report import Table
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.server_process import ServerProcess

ALLOWED, FORBIDDEN = "POSITIVE", "NEGATIVE"
"""Requests that the document allows, and those that it does not."""
HIDDEN = (b"Traceback", b"ipc://", b'File "', b"/tmp/", b"site-packages")
"""What no answer may show."""
_LOOSE = frozenset({
    "tools", "tool_choice", "functions", "response_format", "text", "thinking", "reasoning", "modalities", "audio",
    "chat_template_kwargs", "documents", "reasoning_effort", "structured_outputs", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar",
})  # fmt: skip
"""Fields whose rules say more than their schemas."""
_TOGETHER = frozenset({"model", "min_tokens", "best_of", "echo", "top_logprobs", "timeout_s"})
"""Fields that depend on other fields, on the model or on the time: a value may be allowed and yet not fit."""
_ONE_OF = ("prompt", "content", "messages")
"""Where a body may have each of these, it must have one."""
_DOES_NOT_FIT = (
    b"context_length_exceeded",
    b"the context holds",
    b"the vocabulary has",
    b"tool_call_id",
    b"no function_call before it",
    b"a string with a JSON object",
)
"""In answers to bodies that the document allows, and this model or the combination of fields does not."""
_HELLO = [{"role": "user", "content": "Hi"}]
_SHORT = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_MOST_SHOWN = 300
TIMEOUT_S = 30.0


@dataclass
class Row:
    """What one operation did with the requests of one kind."""

    operation: str
    kind: str
    statuses: Counter[int] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.findings

    @property
    def line(self) -> str:
        counts = ", ".join(f"{status}: {count:,}" for status, count in sorted(self.statuses.items()))
        return f"| {self.operation} | {self.kind.lower()} | {counts} | {len(self.findings)} |"


def operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield path and method of all that the document has."""
    for path, methods in document["paths"].items():
        yield from ((path, method.upper()) for method in methods)


def fuzz(document: dict[str, Any], url: str, path: str, method: str, kind: str, examples: int, seed: int) -> Row:
    """Send ``examples`` requests to one operation. A ``seed`` of 0: the same requests every time."""
    import hypothesis
    import schemathesis
    from schemathesis.generation import GenerationMode

    row = Row(f"{method} {path}", kind)
    operation = schemathesis.openapi.from_dict(document)[path][method]
    described = document["paths"][path][method.lower()]
    fields = _schema(described)["properties"] if method == "POST" else {}

    @hypothesis.seed(seed)
    @hypothesis.given(case=operation.as_strategy(generation_mode=GenerationMode[kind]))
    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=not seed, database=None,
        phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def ask(case: Any) -> None:
        is_plain = method == "POST" and kind == ALLOWED and _make_plain(case.body, fields)
        with suppress(UnicodeError, ValueError):  # headers that no client can send
            response = case.call(base_url=url, timeout=TIMEOUT_S)
            row.statuses[response.status_code] += 1
            finding = _finding(response, described, kind, is_plain, case.body)
            if finding:
                row.findings.append(f"{finding}: {case.body!r:.{_MOST_SHOWN}} got {response.content[:_MOST_SHOWN]!r}")

    ask()
    return row


def _make_plain(body: Any, fields: Mapping[str, Any]) -> bool:
    """Leave out every other time what an allowed body may have and be refused for; return True if it was done.

    The answers get short, so that a model is not what takes the time.
    """
    is_plain = len(body) % 2 == 0
    for name in _LOOSE | _TOGETHER if is_plain else ():
        body.pop(name, None)
    for name in _SHORT:
        if name in fields:
            body[name] = 1 + body.get(name, 0) % 3
    if fields.keys() >= set(_ONE_OF):
        given = [name for name in _ONE_OF if name in body] or ["prompt"]
        body.setdefault(given[0], "x")
        for name in given[1:]:
            del body[name]
    if is_plain and isinstance(body.get("messages"), list):  # results need a call with the same id before them
        body["messages"] = [each for each in body["messages"] if each["role"] != "tool"] or _HELLO
    if "n" in body and "n" in fields:
        body["n"] = 1 + body["n"] % 3
    return is_plain


def _schema(operation: Mapping[str, Any]) -> Any:
    return operation["requestBody"]["content"]["application/json"]["schema"]


def _finding(response: Any, operation: Mapping[str, Any], kind: str, is_plain: bool, body: Any) -> str:
    """Return what is wrong with an answer; empty if nothing is."""
    status, content = response.status_code, response.content
    if str(status) not in operation["responses"]:
        return f"{status} is not in the document"
    if status == 500:
        return "an internal error"
    if any(word in content for word in HIDDEN):
        return "it shows insides"
    if is_plain and status != 200 and not any(word in content for word in _DOES_NOT_FIT):
        return f"{status} for a body that the document allows"
    if kind == FORBIDDEN and status == 200 and _is_forbidden(operation, body):
        return "200 for a body that the document forbids"
    media = response.headers["content-type"][0].partition(";")[0]
    if media not in operation["responses"][str(status)]["content"]:
        return f"{media} is not in the document"
    if media == "application/json":
        try:
            found = json.loads(content)
        except ValueError:
            return "no JSON"
        if status >= 400 and not found["error"]["message"]:
            return "an error without a message"
    return ""


def _is_forbidden(operation: Mapping[str, Any], body: Any) -> bool:
    """Return True unless the body is allowed once null counts as absent, as the server has it."""
    import jsonschema

    if not isinstance(body, dict):
        return True
    return not jsonschema.Draft202012Validator(_schema(operation)).is_valid(
        {name: value for name, value in body.items() if value is not None}
    )


def measure(url: str, minutes: float, save: Path | None) -> Table[Row]:
    """Fuzz every operation in turns until the time is up."""
    facts = describe("schemathesis", "hypothesis")
    table: Table[Row] = Table(save, facts)
    with urlopen(f"{url}/openapi.json", timeout=TIMEOUT_S) as answer:
        document = json.load(answer)
    rows: dict[tuple[str, str, str], Row] = {}
    until_s = time.monotonic() + 60 * minutes
    while time.monotonic() < until_s:
        for path, method in operations(document):
            for kind in (ALLOWED, FORBIDDEN) if method == "POST" else (ALLOWED,):
                found = fuzz(document, url, path, method, kind, 20, 1 + secrets.randbelow(2**31))
                row = rows.setdefault((path, method, kind), Row(found.operation, kind))
                row.statuses += found.statuses
                row.findings += found.findings
    table.say(f"{heading(facts)}\n\n| operation | requests | answers | findings |\n| --- | --- | --- | --- |")
    for row in rows.values():
        table.add(row)
        for text in row.findings:
            table.say(f"    {text}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--url", help="of a server that runs")
    parser.add_argument("--save", type=Path)
    wanted = parser.parse_args()
    if wanted.url:
        table = measure(wanted.url, wanted.minutes, wanted.save)
    else:
        with ServerProcess("-m", "builtin:demo", "--http", "127.0.0.1:0", "--max-seq-len", "1024") as server:
            server.wait_ready()
            table = measure(server.http_url(), wanted.minutes, wanted.save)
    if not table.is_good:
        raise SystemExit("fuzzing has found something")


if __name__ == "__main__":
    main()
