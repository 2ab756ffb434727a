"""Answers of each format, whole and cut at every character."""

import json
from collections.abc import Iterable
from itertools import count

import pytest

from harness.answers.recorded_answers import RECORDED, TOOLS, Recorded
from mgpu.protocol.chat.answer_parser import AnswerParser, ParsedAnswer
from mgpu.protocol.chat.events import CallArguments, CallBegin, Content, Event
from mgpu.protocol.chat.formats import TOOL_FORMATS, ChatFormat, detected, opens_reasoning
from mgpu.protocol.chat.tools import OfferedTools


def parsed(recorded: Recorded, parts: Iterable[str]) -> tuple[str, str, list[tuple[str, str]]]:
    numbers = count()
    parser = AnswerParser(
        recorded.chat_format, OfferedTools(TOOLS), recorded.in_reasoning, new_id=lambda: f"call{next(numbers)}"
    )
    answer = ParsedAnswer()
    for part in parts:
        answer.add(parser.push(part))
    answer.add(parser.finish())
    calls = [(call.name, call.arguments) for call in answer.calls()]
    return "".join(answer.content), "".join(answer.reasoning), calls


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda each: each.name)
def test_a_recorded_answer_is_found_whole_and_cut_anywhere(recorded: Recorded) -> None:
    whole = content, reasoning, calls = parsed(recorded, [recorded.text])
    assert (content, reasoning) == (recorded.content, recorded.reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == recorded.calls
    assert parsed(recorded, recorded.text) == whole
    for at in range(1, len(recorded.text)):
        assert parsed(recorded, [recorded.text[:at], recorded.text[at:]]) == whole


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = AnswerParser(ChatFormat("hermes"), OfferedTools(TOOLS))
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Ber'
    events = [event for character in text for event in parser.push(character)]
    assert [event.name for event in events if isinstance(event, CallBegin)] == ["get_weather"]
    assert "".join(event.text for event in events if isinstance(event, CallArguments)) == '{"city": "Ber'


def test_a_call_of_kimi_has_the_id_that_the_model_wrote_unless_another_has_it() -> None:
    call = "<|tool_call_begin|>functions.get_weather:{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    parser = AnswerParser(ChatFormat("kimi-k2"), OfferedTools(TOOLS))
    events = [*parser.push("".join(call.format(number) for number in (3, 4, 3))), *parser.finish()]
    ids = [event.call_id for event in events if isinstance(event, CallBegin)]
    assert ids[:2] == ["functions.get_weather:3", "functions.get_weather:4"]
    assert ids[2].startswith("functions.get_weather:3-")


def test_without_tools_markers_are_text() -> None:
    parser = AnswerParser(ChatFormat("hermes"))
    text = '<tool_call>{"name": "get_weather", "arguments": {}}</tool_call> \n'
    assert joined([*parser.push(text), *parser.finish()]) == text


def test_a_second_call_is_told_as_soon_as_it_is_there() -> None:
    parser = AnswerParser(ChatFormat("pythonic"), OfferedTools(TOOLS))
    events = parser.push("[get_weather(city='Paris'), get_weather(city='Rome')]")
    assert [type(event).__name__ for event in events].count("CallEnd") == 2


@pytest.mark.parametrize("name", list(TOOL_FORMATS))
def test_nothing_of_a_long_odd_answer_is_lost(name: str) -> None:
    markers = ChatFormat(name).markers()
    text = "".join(f"{marker} {{'[(\n" for marker in markers) * 40 + "x" + " " * 5000 + "y"
    parser = AnswerParser(ChatFormat(name), OfferedTools(TOOLS))
    found = joined(
        [event for at in range(0, len(text), 7) for event in parser.push(text[at : at + 7])] + parser.finish()
    )
    if name == "harmony":
        assert found.endswith("x" + " " * 5000 + "y")
    else:
        assert found == text


def joined(events: list[Event]) -> str:
    assert all(isinstance(event, Content) for event in events), events
    return "".join(event.text for event in events if isinstance(event, Content))


def test_a_call_that_breaks_takes_no_place_of_another() -> None:
    parser, answer = AnswerParser(ChatFormat("hermes"), OfferedTools(TOOLS), most_calls=1), ParsedAnswer()
    broken, good = (f'<tool_call>{{"name": "get-time", "arguments": {rest}}}</tool_call>' for rest in ("{x}", "{}"))
    answer.add(parser.push(f"{broken}\n{good}"))
    answer.add(parser.finish())
    assert [call.name for call in answer.calls()] == ["get-time"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("<tool_call>{name}\n<arg_key>{k}</arg_key> … '<think>' + text + '</think>'", ("glm", "think")),
        ('<minimax:tool_call>\n<invoke name="tool"> … <think>', ("minimax", "think")),
        ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json … </think>", ("deepseek-v3", "think")),
        ("<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜> …", ("deepseek-v3.1", "")),
        ('<｜Assistant｜></think> … <｜DSML｜function_calls>\n<｜DSML｜invoke name="f">', ("deepseek-v3.2", "think")),
        ("<|im_middle|>… <|tool_calls_section_begin|>", ("kimi-k2", "")),
        ("<|turn>model … <|tool_call>call: … <|channel>thought\n", ("gemma4", "gemma4")),
        ("[func_name1(params_name1=params_value1), func_name2(params)]", ("pythonic", "")),
        ("<|header_start|>assistant … <|python_start|>", ("pythonic", "")),
        ('<|header_start|> … <|python_start|> … {"name": "f", "parameters": …}', ("llama", "")),
        ('<tool_call>{"name": "f"}</tool_call> … <think>', ("hermes", "think")),
    ],
)
def test_a_template_shows_its_formats(template: str, found: tuple[str, str]) -> None:
    chat_format = detected(template)
    assert (chat_format.tools, chat_format.reasoning) == found


def test_a_prompt_may_begin_the_reasoning() -> None:
    assert opens_reasoning("<|turn>model\n<|channel>thought\n")
    assert not opens_reasoning("<|turn>model\n<|channel>thought\n<channel|>")
