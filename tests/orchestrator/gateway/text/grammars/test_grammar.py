"""What may be asked of an answer becomes a grammar, or is refused with its place."""

import json
from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest

pytest.importorskip("llguidance")

from mgpu.orchestrator.gateway.text.grammars import grammar as module
from mgpu.orchestrator.gateway.text.grammars.grammar import GrammarError, GrammarTooSlow, checked_grammar
from mgpu.protocol.internal.grammars import CLIENT_ITEMS, CLIENT_RULES, new_matcher, token_table
from mgpu.protocol.internal.worker_messages import Vocabulary

BYTES = Vocabulary(0, [bytes([each]) for each in range(256)] + [b"<|tool|>"], [256])
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def fits(grammar: str, text: str) -> bool:
    matcher, data = new_matcher(token_table(BYTES), grammar), text.encode()
    return bool(matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting())


@pytest.mark.parametrize(("wanted", "good", "bad"), [
    ({"json_schema": json.dumps(PERSON)}, ['{"name": "Aé\\n", "age": 3}', '{"name":"","age":-3}'],
     ['{"name": "A"}', '{"age": 3, "name": "A"}', '{"name": "A", "age": 3.5}', '{"name":   "A", "age": 3}', "{}"]),
    ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}'], ["[]", "", "{", '{"a": tru}']),
    ({"regex": "^[a-c]+/\\d\\\"?$"}, ["a/1", 'cab/9"'], ["/1", "a/", "d/1", "^a/1$"]),
    ({"regex": "ja|nein"}, ["ja", "nein"], ["jain", "j"]),
    ({"choice": ["yes", "n\no", 'a"b\\', "é\u2028😀"]}, ["yes", "n\no", 'a"b\\', "é\u2028😀"], ["no", "ye", "", "\\n"]),
    ({"grammar": 'start: "(" start ")" | "x"'}, ["x", "((x))"], ["((x)", "()"]),
    ({"grammar": 'root ::= "a" item+\nitem ::= [0-9] | "-"'}, ["a1-2", "a-"], ["a", "1"]),
])  # fmt: skip
def test_a_form_allows_its_texts_and_no_others(
    wanted: dict[str, object], good: Iterable[str], bad: Iterable[str]
) -> None:
    grammar = checked_grammar(wanted)
    assert [text for text in good if not fits(grammar, text)] == []
    assert [text for text in bad if fits(grammar, text)] == []


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(("schema", "error"), [
    ({"properties": {"a/b": {"properties": {"c": {"not": {}}}}}}, r'"not".*\(at #/properties/a~1b/properties/c\)'),
    ({"anyOf": [{"type": "string"}, {"type": "strin"}]}, r"Invalid type: strin \(at #/anyOf/1\)"),
    ({"$defs": {"x": {"type": "array", "uniqueItems": True}}, "items": {"$ref": "#/$defs/x"}},
     r"uniqueItems.*\(at #/\$defs/x\)"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, r"/\$defs/none.*\(at #/properties/a\)"),
    ({"properties": {"a": {"$ref": "https://example.com/x"}}}, r"\(at #/properties/a\)"),
    ({"prefixItems": [{}, {"type": "string", "pattern": "("}]}, r"unclosed group \(at #/prefixItems/1\)"),
    ({"type": "integer", "minimum": 5, "maximum": 2}, "greater than"),
    ({"type": "string", "format": "colour"}, "Unknown format"),
    ({"$ref": "#"}, "no text fits it"),
    (False, "false"),
    ([1], "a schema is an object"),
    (nested(3000), "nested too deeply|recursion"),
    ({"allOf": [{"anyOf": [{"type": "object", "properties": {f"{kind}{at}": {}}} for kind in "ab"]}
                for at in range(14)]}, "too large"),
])  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_place(schema: object, error: str) -> None:
    with pytest.raises(GrammarError, match=error) as caught:
        checked_grammar({"json_schema": _json(schema)})
    assert len(str(caught.value)) < 800
    assert str(caught.value).startswith("structured_outputs.json_schema: ")


def _json(schema: object) -> str:
    """Return JSON of any depth."""
    if isinstance(schema, dict) and "items" in schema and "$defs" not in schema:
        depth = 0
        while "items" in schema:
            schema, depth = schema["items"], depth + 1
        return '{"type": "array", "items": ' * depth + json.dumps(schema) + "}" * depth
    return json.dumps(schema)


@pytest.mark.parametrize(("wanted", "error"), [
    ({"json_schema": "{"}, "not JSON"),
    ({"json_schema": "[" * 100_000}, "nested too deeply"),
    ({"json_schema": '{"a": NaN}'}, "expected value"),
    ({"regex": "a("}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"regex": "(" * 20_000 + ")" * 20_000}, "nested"),
    ({"grammar": "hello"}, "Expected token"),
    ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ({"grammar": "start: start"}, "no text fits it"),
    ({"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000}, "deeply nested"),
    ({"grammar": "root ::= ("}, "not a GBNF grammar"),
    ({"grammar": 'start: "a" <|nothing|>'}, "unknown special token"),
    ({"grammar": "start: " + " ".join(['("a"|"b")?'] * 1500)}, "Too many items|to compile"),
])  # fmt: skip
def test_what_is_no_grammar_is_refused_in_a_line(wanted: dict[str, object], error: str) -> None:
    with pytest.raises(GrammarError, match=error) as caught:
        checked_grammar(wanted)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_grammar_can_name_special_tokens_of_the_model() -> None:
    wanted = {"grammar": 'start: <|tool|> "x"'}
    assert checked_grammar(wanted, lambda: token_table(BYTES))
    assert not fits(checked_grammar({"grammar": 'start: "<|tool|>"'}, lambda: token_table(BYTES)), "<|tool|")


def test_a_grammar_that_takes_long_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CPU_S", 0.0)
    with pytest.raises(GrammarTooSlow, match="more than 0 s of CPU time to compile"):
        checked_grammar({"json_object": True})


def test_the_tokens_of_the_model_tell_whether_a_grammar_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few hundred rules that may begin, follow one another, and end anywhere: the mask takes seconds of CPU time."""
    names = range(400)
    rules = [f"r{each}: /[a-z]{{1,{each + 1}}}/ start" for each in names]
    wanted = {"demanded": "\n".join(["start: " + " | ".join(f"r{each}" for each in names), *rules])}
    letters, after = b"etaoin", b"etaoin .,1-"
    words = [bytes(each) for each in product(letters, after, after, after)]
    monkeypatch.setattr(module, "MAX_CPU_S", 0.1)
    later = {"demanded": wanted["demanded"].replace("start", "more") + '\nstart: "7" more'}
    for each in (wanted, later):
        with pytest.raises(GrammarTooSlow, match="fewer rules or alternatives"):
            checked_grammar(each, lambda: token_table(Vocabulary(0, [*BYTES.tokens[:256], *words], [])))


def test_rules_of_a_client_have_a_bounded_number_of_open_alternatives() -> None:
    def rules(count: int) -> str:
        names = [f"r{each}" for each in range(count)]
        return f'start: "7" more\nmore: {" | ".join(names)}\n' + "\n".join(f'{name}: /{name}x*/ "-"' for name in names)

    assert fits(checked_grammar({"grammar": rules(CLIENT_ITEMS - 8)}), "7r7xx-")
    matcher = new_matcher(token_table(BYTES), checked_grammar({"grammar": rules(CLIENT_ITEMS + 8)}))
    assert not matcher.consume_token(ord("7"))
    assert f"max is {CLIENT_ITEMS}" in matcher.get_error()
    assert fits(checked_grammar({"demanded": rules(CLIENT_ITEMS + 8)}), "7r7xx-")
    assert CLIENT_RULES in checked_grammar({"grammar": rules(2)})


def test_a_schema_may_have_hundreds_of_optional_properties() -> None:
    schema = {"type": "object", "properties": {f"name{each}": {"type": "integer"} for each in range(400)}}
    assert fits(checked_grammar({"json_schema": json.dumps({**schema, "additionalProperties": False})}), '{"name9": 1}')
