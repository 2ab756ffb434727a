"""The form of an answer, as each path names it, becomes the engine's grammar."""

from typing import Any

import pytest

pytest.importorskip("llguidance")

from harness.servers.gateway_process import GatewayProcess, says
from harness.servers.http_process import HttpServer

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "Hi"}]
BODIES = {CHAT: {"messages": HELLO}, TEXT: {"prompt": "x"}, RESPONSES: {"input": "x"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize(("path", "fields", "part"), [
    (CHAT, {"response_format": NAMED}, '"required": ["a"]'),
    (CHAT, {"response_format": {"type": "json_object"}}, '%json {"type": "object"'),
    (CHAT, {"response_format": {"type": "text"}}, None),
    (CHAT, {"structured_outputs": {"json": SCHEMA}, "stream": True}, '"required": ["a"]'),
    (CHAT, {"structured_outputs": {"json_schema": '{"type": "null"}'}}, '"type": "null"'),
    (CHAT, {"guided_json": SCHEMA}, '"required": ["a"]'),
    (TEXT, {"response_format": NAMED}, '"required": ["a"]'),
    (TEXT, {"structured_outputs": {"choice": ["a", "b"]}}, '"a" | "b"'),
    (TEXT, {"guided_choice": ["a", "b"]}, '"a" | "b"'),
    (TEXT, {"guided_regex": "a+"}, "start: /a+/"),
    (TEXT, {"guided_grammar": 'root ::= "a"'}, 'start: "a"'),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}, '"required": ["a"]'),
    (RESPONSES, {"text": {"format": {"type": "json_object"}, "verbosity": "low"}}, '%json {"type": "object"'),
    (RESPONSES, {"structured_outputs": {"regex": "a"}}, "start: /a/"),
])  # fmt: skip
def test_a_form_arrives(
    http: HttpServer, gateway: GatewayProcess, path: str, fields: dict[str, Any], part: str | None
) -> None:
    gateway.engine.script = says("a")
    answer = http.post(path, {**BODIES[path], **fields})
    assert answer.status == 200, answer.body
    [submit] = gateway.engine.submits
    grammar = submit.sampling.grammar
    assert grammar is None if part is None else grammar is not None and part in grammar.text
    if "text" in fields:
        assert answer.json["text"]["format"] == fields["text"]["format"]
