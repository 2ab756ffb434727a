"""What `/set` takes, refuses and shows."""

import pytest

from mgpu.launch.chat.settings import RULES, Settings


@pytest.mark.parametrize(("typed", "options"), [
    ("temperature 0.7", {"temperature": 0.7}),
    ("--max-tokens 5", {"max_tokens": 5}),
    ("seed  18446744073709551615", {"seed": 2**64 - 1}),
    ("stop END OF IT", {"stop": ("END OF IT",)}),
    ("enable_thinking off", {"template_options": {"enable_thinking": False}}),
    ("reasoning_effort high", {"template_options": {"reasoning_effort": "high"}}),
    ("top_k default", {}),
])  # fmt: skip
def test_a_value_is_taken(typed: str, options: dict[str, object]) -> None:
    settings = Settings({})
    assert settings.set(typed) == ""
    assert settings.options() == options


@pytest.mark.parametrize(("typed", "words"), [
    ("temperature hot", "temperature must be a number from 0 to 100, got 'hot'"),
    ("temperature nan", "temperature must be a number from 0 to 100"),
    ("max_tokens 1.5", "max_tokens must be an integer from 1"),
    ("max_tokens 0", "max_tokens must be an integer from 1"),
    ("enable_thinking maybe", "enable_thinking must be true or false, got 'maybe'"),
    ("n 3", "n is no option; the options are max_tokens"),
    ("stop " + "x" * 257, "a string of 1 to 256 characters"),
])  # fmt: skip
def test_what_is_not_allowed_is_said_and_changes_nothing(typed: str, words: str) -> None:
    settings = Settings({"temperature": 0.5})
    assert words in settings.set(typed)
    assert settings.options() == {"temperature": 0.5}


def test_default_takes_an_option_back() -> None:
    settings = Settings({"temperature": 0.5})
    assert settings.set("temperature default") == ""
    assert settings.options() == {}


def test_the_options_are_shown() -> None:
    settings = Settings({"temperature": 0.5})
    assert settings.set("").startswith("set: temperature 0.5\n")
    assert all(name in settings.set("") for name in RULES)
    assert settings.set("temperature").startswith("temperature 0.5: 0 takes the likeliest token always")
    assert settings.set("max_tokens").startswith("max_tokens [what the context still holds]: the longest answer")
    assert settings.set("thinking") == "thinking [that of the model]: a variable of the chat template (true or false)"
