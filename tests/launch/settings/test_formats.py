"""The formats that `serve` takes are those that there are parsers for."""

from typing import get_args, get_type_hints

from mgpu.launch.settings.config import ServeConfig
from mgpu.protocol.chat.formats import REASONING_FORMAT_NAMES, TOOL_FORMAT_NAMES, ChatFormat, detected


def test_serve_takes_the_formats_that_there_are() -> None:
    hints = get_type_hints(ServeConfig)
    assert get_args(hints["tool_format"]) == TOOL_FORMAT_NAMES
    assert get_args(hints["reasoning_format"]) == REASONING_FORMAT_NAMES


def test_an_option_overrides_the_template() -> None:
    template = "{{ tools }} <tool_call> <think>"
    assert detected(template) == ChatFormat("hermes", "think")
    assert detected(template, "mistral", "none") == ChatFormat("mistral", "")
    assert detected(None, "llama") == ChatFormat("llama", "")
