"""The rules that bound every field of the front channel."""

import math
import struct
from dataclasses import fields
from typing import Any

import pytest

from mgpu.protocol.client.requests.request_message import SHORTCUTS, GenerateOptions
from mgpu.protocol.front.client_messages import (
    GENERATE_RULES,
    CancelRequest,
    Detokenize,
    Generate,
    Query,
    ResumeRequest,
    TakeBatches,
    Tokenize,
    parse_client_message,
)
from mgpu.protocol.front.fields import FieldError, shown
from mgpu.protocol.front.server_messages import Failed, Finished, Tokens, parse_server_message, to_map

CONTENTS = {"prompt", "prompt_ids", "messages"}


def generate(**changes: Any) -> Generate:
    message = parse_client_message({"type": "generate", "id": 1, "prompt": "x", **changes})
    assert isinstance(message, Generate)
    return message


def test_every_field_has_a_rule_and_every_option_is_a_field() -> None:
    names = {field.name for field in fields(Generate)}
    assert names == set(GENERATE_RULES)
    own = {"id", *CONTENTS, "show_markers", "stream", "session", "keep_s", "emitted_ids"}
    assert set(GenerateOptions.__annotations__) - set(SHORTCUTS) == names - own


def test_defaults_pass_their_own_rules() -> None:
    for name, rule in GENERATE_RULES.items():
        default = next(field.default for field in fields(Generate) if field.name == name)
        if default is not None and name != "id":
            assert rule.parse(name, default) == default


BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 0.5, 100], [-0.1, 100.1, math.nan, math.inf, -math.inf, 1e308, "1", True, [1]]),
    ("top_p", [1e-9, 1], [0, -1, 1.01, math.nan]),
    ("min_p", [0, 1], [-0.01, 1.01, math.nan]),
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31, 1.0, True]),
    ("repetition_penalty", [0.01, 10], [0, -1, 10.1, 1e308]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1, 1e308]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("seed", [0, 2**64 - 1], [-1, 2**64, "1", 1.5]),
    ("n", [1, 16], [0, 17, 10**9, -1, True]),
    ("logprobs", [0, 20], [-1, 21, 10**6]),
    ("max_tokens", [1, 2**31 - 1], [0, -1, 2**63, 1.5]),
    ("min_tokens", [0, 5], [-1, 2**31]),
    ("stop", [[], ["a"], ["x" * 256] * 16], ["abc", [""], ["x" * 257], ["a"] * 17, [1], {"a": 1}]),
    ("stop_token_ids", [[], [0, 5]], [[-1], [2**31], [1] * 65, ["1"], [True]]),
    ("logit_bias", [[], [[5, -100], [6, 100]]], [[[5, -101]], [[5, math.nan]], [[-1, 0]], [[5]], {"5": 1}]),
    ("logit_bias", [[[at, 0] for at in range(1024)]], [[[5, 1], [5, 2]], [[at, 0] for at in range(1025)], [5, 6]]),
    ("priority", [-1000, 1000], [-1001, 1001, 0.5]),
    ("cache_salt", ["", "x" * 256], ["x" * 257, b"x", 5]),
    ("account", ["", "x" * 128], ["x" * 129, b"x", 5]),
    ("timeout_s", [0.1, 86400], [0, -1, 86401, math.inf, math.nan]),
    ("stream", [True, False], [0, 1, "yes"]),
    ("ignore_eos", [True, False], [1]),
    ("model", ["m"], ["", "x" * 513, 5]),
    ("prompt", ["x"], ["", 5, b"x", "a\ud800b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "good", "bad"), BOUNDS, ids=[name for name, *_ in BOUNDS])
def test_values_within_bounds_pass_and_others_are_named(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        generate(**{name: value, **({"max_tokens": 100} if name == "min_tokens" else {})})
    for value in bad:
        with pytest.raises(FieldError, match=name):
            generate(**{name: value})


def test_an_error_has_the_value_and_what_is_allowed() -> None:
    with pytest.raises(FieldError, match=r"temperature must be a number from 0 to 100, got -3"):
        generate(temperature=-3)
    with pytest.raises(FieldError, match=r"seed must be an integer from 0 to 2\^64 - 1, got -1"):
        generate(seed=-1)
    with pytest.raises(FieldError, match=r"top_p must be a number above 0, at most 1, got 0"):
        generate(top_p=0)


@pytest.mark.parametrize("name", ["temprature", "topp", "max_token", "stopp"])
def test_an_unknown_field_names_its_nearest_relative(name: str) -> None:
    with pytest.raises(FieldError, match=r"unknown field .*did you mean (temperature|top_p|max_tokens|stop)\?"):
        generate(**{name: 1})


def test_hostile_values_are_described_in_a_few_characters() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("x" * 10**6, 10**4000, nested, {"a": nested}, b"x" * 10**6, ["y" * 100] * 10**4, "\ud800\x1b[31m"):
        text = shown(value)
        assert len(text) <= 60
        assert text.isprintable()


def test_fields_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(FieldError, match="exactly one of prompt, prompt_ids and messages, got prompt and prompt_ids"):
        generate(prompt_ids=[1])
    with pytest.raises(FieldError, match=r"min_tokens \(5\) is above max_tokens \(4\)"):
        generate(min_tokens=5, max_tokens=4)
    with pytest.raises(FieldError, match="template_options only apply to messages"):
        generate(template_options={"enable_thinking": True})


@pytest.mark.parametrize(("wanted", "error"), [
    ("json", "must be a map of one of json_schema"),
    ({}, "exactly one of json_schema, json_object, regex, choice, grammar, got none"),
    ({"regex": "a", "choice": ["b"]}, "got 'regex, choice'"),
    ({"xml": "a"}, "got 'xml'"),
    ({"json_object": False}, "json_object must be true"),
    ({"json_schema": {"type": "object"}}, "json_schema must be a string of 1 to 131072"),
    ({"regex": ""}, "regex must be a string of 1"),
    ({"regex": "é" * 70_000}, "regex has 140000 bytes, the limit is 131072"),
    ({"choice": []}, "choice must be an array of 1 to 1024"),
    ({"choice": ["a" * 1000] * 200}, "choice has 200000 bytes"),
    ({"grammar": "\ud800"}, "lone surrogate"),
])  # fmt: skip
def test_a_form_of_the_answer_that_is_none_is_refused(wanted: object, error: str) -> None:
    with pytest.raises(FieldError, match=error):
        generate(structured_outputs=wanted)


@pytest.mark.parametrize("option", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_no_option_says_when_a_structured_answer_ends(option: dict[str, Any]) -> None:
    assert generate(structured_outputs={"choice": ["a"]}).structured_outputs == {"choice": ("a",)}
    with pytest.raises(FieldError, match=f"{next(iter(option))} does not go with structured_outputs"):
        generate(structured_outputs={"choice": ["a"]}, **option)


def test_ids_are_the_same_as_an_array_or_as_a_bin() -> None:
    packed = struct.pack("<3i", 1, 2, 70000)
    for given in ([1, 2, 70000], packed):
        message = parse_client_message({"type": "generate", "id": 1, "prompt_ids": given})
        assert isinstance(message, Generate)
        assert message.prompt_ids == packed


@pytest.mark.parametrize(
    "ids", [[], b"", b"12345", [1.0], [True], ["1"], [-1], [2**31], struct.pack("<i", -5), "ids", None]
)
def test_wrong_ids_are_refused(ids: object) -> None:
    with pytest.raises(FieldError, match="prompt_ids"):
        parse_client_message({"type": "generate", "id": 1, "prompt_ids": ids})


def test_nil_means_the_default() -> None:
    assert generate(seed=None, temperature=None, stop=None) == generate()


def test_queries_and_cancel_need_an_id_only() -> None:
    assert parse_client_message({"type": "cancel", "id": 5}) == CancelRequest(5)
    assert parse_client_message({"type": "batch", "id": 5}) == TakeBatches(5)
    assert parse_client_message({"type": "stats", "id": 0}) == Query("stats", 0)
    with pytest.raises(FieldError, match="id is missing"):
        parse_client_message({"type": "health"})
    with pytest.raises(
        FieldError,
        match="type must be one of generate, resume, cancel, batch, tokenize, detokenize, health, stats, mod",
    ):
        parse_client_message({"id": 1})


def test_resuming_needs_a_session_that_cannot_be_guessed_and_an_offset_per_choice() -> None:
    message = {"type": "resume", "id": 1, "session": "s" * 16, "offsets": [0, -1]}
    assert parse_client_message(message) == ResumeRequest(1, "s" * 16, (0, -1))
    for name, wrong in {"session": "short", "offsets": []}.items():
        with pytest.raises(FieldError, match=f"{name} must be"):
            parse_client_message({**message, name: wrong})
        with pytest.raises(FieldError, match=f"{name} is missing"):
            parse_client_message({key: value for key, value in message.items() if key != name})


def test_server_messages_survive_their_map_and_skip_what_is_new() -> None:
    tokens = Tokens(1, 0, "é", [5, 6], None, "stop")
    for message in (tokens, Finished(1, ["stop"], 2, 3, 0), Failed(None, "overloaded", "later", 1.5)):
        values: dict[Any, Any] = {**to_map(message), "added_in_a_later_version": 1}
        assert parse_server_message(values) == message
    for wrong in ({"type": "surprise"}, {"type": "tokens", "id": 1}, {}):
        with pytest.raises(FieldError):
            parse_server_message(wrong)


def test_a_tokenize_has_one_text_and_a_result_that_fits_it() -> None:
    chat = [{"role": "user", "content": "x"}]
    assert parse_client_message({"type": "tokenize", "id": 1, "prompt": ""}) == Tokenize(1, "")
    assert parse_client_message({"type": "tokenize", "id": 1, "messages": chat, "returns": "text"}) == Tokenize(
        1, messages=tuple(chat), returns="text"
    )
    for given, words in (
        ({}, "got neither"),
        ({"prompt": "x", "messages": chat}, "got both"),
        ({"prompt": "x", "returns": "text"}, "returns 'text' only applies to messages"),
        ({"prompt": "x", "template_options": {"thinking": True}}, "template_options only applies to messages"),
        ({"prompt": "x", "session": "0123456789abcdef"}, "unknown field 'session'"),
    ):
        with pytest.raises(FieldError, match=words):
            parse_client_message({"type": "tokenize", "id": 1, **given})


def test_a_detokenize_has_token_ids() -> None:
    assert parse_client_message({"type": "detokenize", "id": 1, "token_ids": [1]}) == Detokenize(1, b"\1\0\0\0")
    with pytest.raises(FieldError, match="token_ids is missing"):
        parse_client_message({"type": "detokenize", "id": 1})


WHOLE: dict[str, dict[str, object]] = {
    "accepted": {"id": 1, "model": "m", "prompt_tokens": 3, "max_tokens": 9, "seed": 5},
    "resumed": {"id": 1, "offsets": [0]},
    "tokens": {"id": 1, "index": 0, "text": "x", "token_ids": [5], "logprobs": [{}], "finish_reason": "stop"},
    "finished": {
        "id": 1, "finish_reasons": ["stop"], "prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0
    },
    "failed": {"id": 1, "code": "overloaded", "message": "busy", "retry_after_s": 0.5},
    "stats": {"id": 1, "counters": {"running": 1}},
    "tokenized": {"id": 1, "num_tokens": 1, "token_ids": b"\5\0\0\0", "text": "x"},
    "detokenized": {"id": 1, "text": "x"},
    "models": {"id": 1, "models": [{"name": "m"}]},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in WHOLE.items() for name in fields])
def test_a_server_message_with_a_field_of_another_type_is_refused(kind: str, name: str) -> None:
    parse_server_message({"type": kind, **WHOLE[kind]})
    for wrong in (b"x", True, [None], [1.5], {"a": []}, [[]], math.nan):
        with pytest.raises(FieldError, match=f"^{name} of {kind} is "):
            parse_server_message({"type": kind, **WHOLE[kind], name: wrong})


@pytest.mark.parametrize("seconds", [-1, math.inf, math.nan])
def test_a_server_cannot_put_a_retry_off_for_ever(seconds: float) -> None:
    with pytest.raises(FieldError, match="retry_after_s"):
        parse_server_message({"type": "failed", **WHOLE["failed"], "retry_after_s": seconds})
