"""The forms of an answer as Python callers write them."""

import json
from typing import Any

import pytest

from mgpu import RequestFailed
from mgpu.protocol.client.requests.request_message import generate_message

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


class Model:
    """What mgpu asks of a pydantic model."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return SCHEMA


def form_of(**options: Any) -> object:
    return generate_message(1, {"prompt": "x"}, options, stream=False, timeout_s=5)["structured_outputs"]  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA), Model, Model()])
def test_a_schema_may_be_a_map_a_text_or_a_class_that_describes_itself(given: object) -> None:
    for form in (form_of(json_schema=given), form_of(structured_outputs={"json_schema": given})):
        assert form == {"json_schema": json.dumps(SCHEMA)}


@pytest.mark.parametrize("options", [{"regex": "a"}, {"choice": ["a", "b"]}, {"grammar": 'start: "a"'}])
def test_each_form_is_an_option_too(options: dict[str, Any]) -> None:
    assert form_of(**options) == options == form_of(structured_outputs=options)


@pytest.mark.parametrize(("options", "error"), [
    ({"regex": "a", "choice": ["b"]}, "one form of the answer, got regex, choice"),
    ({"regex": "a", "structured_outputs": {"json_object": True}}, "got regex, structured_outputs"),
    ({"json_schema": 5}, "json_schema must be a map, JSON text or a pydantic model, got int"),
    ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"),
    ({"json_schema": {"a": float("nan")}}, "json_schema is no JSON"),
    ({"choice": "abc"}, "choice must be an array"),
    ({"regex": ""}, "regex must be a string of 1"),
    ({"regex": "a", "min_tokens": 4}, "min_tokens does not go with structured_outputs"),
])  # fmt: skip
def test_what_is_no_form_is_refused_before_it_is_sent(options: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestFailed, match=error):
        form_of(**options)
