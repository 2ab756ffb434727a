"""The clients that people own, unchanged, against the real small model (extra ``compat``, which `make test` brings)."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from mgpu import Client
from mgpu.launch.server_process import ServerProcess

pytestmark = pytest.mark.filterwarnings("ignore")  # of those clients
REASON = "needs the packages of mgpu[compat]"
NAME = "smollm2"
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
STOP = "!"
"""In the answer to that. Helpers of clients raise an error for an answer that its length has ended."""
GREEDY = {"temperature": 0}
"""Clients of Anthropic have no such argument any more."""


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.http_url()


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> str:
    """What the model says, by the front channel."""
    with Client(server.wait_ready()) as client:
        return client.chat(HELLO, max_tokens=8, temperature=0).text


@pytest.fixture(scope="module")
def openai(url: str) -> Iterator[Any]:
    module = pytest.importorskip("openai", reason=REASON)
    with module.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def anthropic(url: str) -> Iterator[Any]:
    module = pytest.importorskip("anthropic", reason=REASON)
    with module.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chats(openai: Any, expected: str) -> None:
    completion = openai.chat.completions.create(model=NAME, messages=HELLO, max_tokens=8, temperature=0)
    assert completion.choices[0].message.content == expected
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens


def test_openai_streams_a_chat(openai: Any, expected: str) -> None:
    stream = openai.chat.completions.create(
        model=NAME, messages=HELLO, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True},
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == 8
    logprobs = [entry for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
                for entry in chunk.choices[0].logprobs.content]  # fmt: skip
    assert len(logprobs) == 8
    assert len(logprobs[0].top_logprobs) == 2


def test_openais_stream_helper_collects_a_chat(openai: Any, expected: str) -> None:
    with openai.chat.completions.stream(model=NAME, messages=HELLO, temperature=0, stop=STOP) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == expected.partition(STOP)[0]


def test_openai_completes_text(openai: Any) -> None:
    done = openai.completions.create(model=NAME, prompt=["One, two,", "A, B,"], max_tokens=3, n=2, temperature=0)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    pieces = openai.completions.create(model=NAME, prompt="One, two,", max_tokens=3, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == done.choices[0].text


def test_openai_creates_responses(openai: Any, expected: str) -> None:
    response = openai.responses.create(model=NAME, input="Say hello.", max_output_tokens=8, temperature=0)
    assert response.output_text == expected
    assert response.status == "incomplete"
    events = list(openai.responses.create(model=NAME, input=HELLO, max_output_tokens=8, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].response.usage.output_tokens == 8
    with openai.responses.stream(model=NAME, input="Say hello.", temperature=0, extra_body={"stop": STOP}) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == expected.partition(STOP)[0]


def test_openai_parses_answers_into_pydantic_models(openai: Any) -> None:
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Answer(BaseModel):
        colour: Literal["red", "green", "blue"]
        is_bright: bool

    chat = openai.chat.completions.parse(model=NAME, messages=HELLO, temperature=0, response_format=Answer)
    assert isinstance(chat.choices[0].message.parsed, Answer)
    response = openai.responses.parse(model=NAME, input="A colour?", temperature=0, text_format=Answer)
    assert isinstance(response.output_parsed, Answer)


def test_openai_lists_models(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == [NAME]
    assert openai.models.retrieve(NAME).id == NAME


def test_openai_raises_its_own_errors(openai: Any) -> None:
    import openai as module

    with pytest.raises(module.NotFoundError, match="not served here"):
        openai.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(module.BadRequestError) as wrong:
        openai.chat.completions.create(model=NAME, messages=HELLO, temperature=1000)
    assert wrong.value.param == "temperature"
    with pytest.raises(module.BadRequestError) as long:
        openai.chat.completions.create(model=NAME, messages=HELLO, max_tokens=9000)
    assert long.value.code == "context_length_exceeded"


def test_openai_async_chats_side_by_side(url: str, expected: str) -> None:
    module = pytest.importorskip("openai", reason=REASON)

    async def chat_all() -> list[str]:
        async with module.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            ask = client.chat.completions.create
            answers = await asyncio.gather(
                *(ask(model=NAME, messages=HELLO, max_tokens=8, temperature=0) for _ in range(8))
            )
            stream = await ask(model=NAME, messages=HELLO, max_tokens=8, temperature=0, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [*(answer.choices[0].message.content for answer in answers), streamed]

    assert asyncio.run(chat_all()) == [expected] * 9


def test_anthropic_creates_and_streams_messages(anthropic: Any, expected: str) -> None:
    message = anthropic.messages.create(model=NAME, messages=HELLO, max_tokens=8, extra_body=GREEDY)
    assert message.content[0].text == expected
    assert message.stop_reason == "max_tokens"
    with anthropic.messages.stream(model=NAME, messages=HELLO, max_tokens=8, extra_body=GREEDY) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().usage.output_tokens == 8
    count = anthropic.messages.count_tokens(model=NAME, messages=HELLO, system="Be kind.")
    assert count.input_tokens > 10


def test_anthropic_raises_its_own_errors(anthropic: Any) -> None:
    import anthropic as module

    with pytest.raises(module.NotFoundError):
        anthropic.messages.create(model="claude", messages=HELLO, max_tokens=8)
    with pytest.raises(module.BadRequestError, match="1 to 64 letters"):
        anthropic.messages.create(model=NAME, messages=HELLO, max_tokens=8, tools=[{"name": "f g", "input_schema": {}}])


def test_langchain_invokes_and_streams(url: str, expected: str) -> None:
    module = pytest.importorskip("langchain_openai", reason=REASON)
    chat = module.ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=NAME, max_tokens=8, temperature=0)
    answer = chat.invoke("Say hello.")
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(chunk.content for chunk in chat.stream("Say hello.")) == expected
    assert [each.content for each in chat.batch(["Say hello."] * 3)] == [expected] * 3


def weather(city: Literal["Bern", "Rome"]) -> str:
    """Return the weather of a city."""
    return f"Sunny in {city}."


CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Rome"]}}, "required": ["city"]}
TOOL = {"name": "weather", "parameters": CITY}
ASK: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]


def test_openai_calls_a_tool_and_goes_on_with_its_result(openai: Any) -> None:
    pytest.importorskip("llguidance")
    ask: dict[str, Any] = {"model": NAME, "tools": [{"type": "function", "function": TOOL}], "temperature": 0}
    demand = {"tool_choice": "required", "parallel_tool_calls": False}
    message = openai.chat.completions.create(messages=ASK, **ask, **demand).choices[0].message
    [call] = message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    result = {"role": "tool", "tool_call_id": call.id, "content": weather("Rome")}
    last = openai.chat.completions.create(messages=[*ASK, message, result], **ask, tool_choice="none", max_tokens=1)
    assert last.choices[0].message.content


def test_anthropic_calls_a_tool_and_goes_on_with_its_result(anthropic: Any) -> None:
    pytest.importorskip("llguidance")
    tool = {"name": "weather", "description": "The weather of a city.", "input_schema": CITY}
    ask: dict[str, Any] = {"model": NAME, "tools": [tool], "extra_body": GREEDY}
    choice = {"type": "tool", "name": "weather"}
    with anthropic.messages.stream(messages=ASK, max_tokens=60, **ask, tool_choice=choice) as stream:
        message = stream.get_final_message()
    [call] = message.content
    assert (message.stop_reason, call.input["city"] in ("Bern", "Rome")) == ("tool_use", True)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}]}
    turns = [*ASK, {"role": "assistant", "content": message.content}, result]
    assert anthropic.messages.create(messages=turns, max_tokens=1, **ask, tool_choice={"type": "none"}).content[0].text


def test_the_loop_of_the_tools_page_asks_calls_and_answers(server: ServerProcess) -> None:
    pytest.importorskip("llguidance")
    page = (Path(__file__).parents[2] / "docs/tools.md").read_text()
    [loop] = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "while answer.tool_calls" in code]
    environment = {**os.environ, "MGPU_ENDPOINT": server.wait_ready()}
    done = subprocess.run([sys.executable, "-c", loop], capture_output=True, text=True, timeout=300, env=environment)
    called, *answer = done.stdout.splitlines()
    assert re.fullmatch(r"get_weather\(\{'city': '(.*)'\}\) -> It is sunny in \1, 21 degrees\.", called), done.stderr
    assert "".join(answer)


def test_a_langchain_agent_calls_its_tool_and_answers(url: str) -> None:
    pytest.importorskip("llguidance")
    agents = pytest.importorskip("langchain.agents", reason=REASON)
    from langchain.agents.middleware import wrap_model_call
    from langchain_openai import ChatOpenAI

    @wrap_model_call
    def demand_a_call_first(request: Any, handler: Any) -> Any:
        """A small model seldom calls by itself."""
        is_first = len(request.messages) == 1
        return handler(request.override(tool_choice="weather" if is_first else "none"))

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=NAME, max_tokens=30, temperature=0)
    agent = agents.create_agent(chat, [weather], middleware=[demand_a_call_first])
    _, calls, result, answer = agent.invoke({"messages": ASK})["messages"]
    assert [call["name"] for call in calls.tool_calls] == ["weather"]
    assert (calls.content, result.content) == ("", weather(calls.tool_calls[0]["args"]["city"]))
    assert answer.content


def test_instructor_fills_pydantic_models(openai: Any) -> None:
    """instructor is no part of mgpu[compat]: its releases hold back those of openai and rich."""
    pytest.importorskip("llguidance")
    module = pytest.importorskip("instructor", reason="needs the package instructor")
    from pydantic import BaseModel

    class Colour(BaseModel):
        name: Literal["red", "green", "blue"]

    for mode in (module.Mode.TOOLS, module.Mode.JSON_SCHEMA):
        client = module.from_openai(openai, mode=mode)
        found = client.chat.completions.create(model=NAME, messages=HELLO, response_model=Colour, temperature=0)
        assert isinstance(found, Colour)


LITELLM = """
import sys
import litellm

url, name = sys.argv[1:]
ask = dict(messages=[{"role": "user", "content": "Say hello."}], max_tokens=8, temperature=0, api_key="none")
by_openai = litellm.completion(f"openai/{name}", api_base=f"{url}/v1", **ask)
by_vllm = litellm.completion(f"hosted_vllm/{name}", api_base=f"{url}/v1", **ask)
pieces = litellm.completion(f"openai/{name}", api_base=f"{url}/v1", stream=True, **ask)
print(by_openai.choices[0].message.content)
print(by_vllm.choices[0].message.content)
print("".join(piece.choices[0].delta.content or "" for piece in pieces))
parameters = {"type": "object", "properties": {"to": {"const": "you"}}, "required": ["to"]}
function = {"name": "hello", "parameters": parameters}
ask = {**ask, "max_tokens": 40, "tools": [{"type": "function", "function": function}]}
choice = {"type": "function", "function": {"name": "hello"}}
called = litellm.completion(f"openai/{name}", api_base=f"{url}/v1", tool_choice=choice, **ask)
print(called.choices[0].message.tool_calls[0].function.arguments)
"""


def test_litellm_completes_streams_and_calls_a_tool(url: str, expected: str) -> None:
    pytest.importorskip("openai", reason=REASON)
    pytest.importorskip("llguidance")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LITELLM, url, NAME],
        capture_output=True, text=True, timeout=120, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )  # fmt: skip
    if "No module named 'litellm'" in done.stderr:
        pytest.skip(REASON)
    assert done.stdout.splitlines() == [*expected.splitlines() * 3, '{"to": "you"}'], done.stderr
