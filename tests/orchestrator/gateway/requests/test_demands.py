"""A `tool_choice` that demands a call becomes the form of the answer, or is refused with the way out."""

from typing import Any

import pytest

from harness.answers.tool_templates import weather_tool
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.demands import with_demanded_call
from mgpu.protocol.chat.formats import ChatFormat
from mgpu.protocol.front.client_messages import Generate, parse_client_message


def request(**more: Any) -> Generate:
    fields = {"tools": [weather_tool()], "tool_choice": "required", **more}
    found = parse_client_message(
        {"type": "generate", "id": 1, "messages": [{"role": "user", "content": "x"}], **fields}
    )
    assert isinstance(found, Generate)
    return found


@pytest.mark.parametrize(
    "name", ["hermes", "llama", "mistral", "qwen3-coder", "glm", "minimax", "deepseek-v3.2", "pythonic", "harmony"]
)
def test_a_demand_becomes_a_grammar(name: str) -> None:
    form = with_demanded_call(request(), ChatFormat(name)).structured_outputs
    assert form is not None
    assert "get_weather" in str(form["demanded"])
    assert with_demanded_call(request(tool_choice="auto"), ChatFormat(name)).structured_outputs is None


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("", {}, "that of this model is unknown; use auto"),
        ("hermes", {"ignore_eos": True}, "ignore_eos does not go with"),
        ("hermes", {"structured_outputs": {"regex": "a"}}, "structured_outputs does not go with"),
    ],
)
def test_a_demand_that_cannot_be_met_says_what_to_do(name: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        with_demanded_call(request(**more), ChatFormat(name))


def test_a_schema_that_plain_values_cannot_fit_is_refused_with_the_parameter() -> None:
    parameters = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(Refusal, match=r"the parameter 'day' of f: format cannot be enforced .* use auto"):
        with_demanded_call(request(tools=[tool]), ChatFormat("qwen3-coder"))
    assert with_demanded_call(request(tools=[tool]), ChatFormat("hermes")).structured_outputs
