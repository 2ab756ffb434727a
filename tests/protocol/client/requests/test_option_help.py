"""What `help`, a prompt of Python and a notebook show of the clients."""

import asyncio
import inspect
import pydoc
import subprocess
import sys

import pytest

import mgpu
from harness.servers.gateway_process import GatewayProcess, says
from mgpu import AsyncClient, Client, Completion, CompletionChoice, GenerateOptions, Usage
from mgpu.protocol.client.requests.option_help import MEANINGS
from mgpu.protocol.client.requests.request_message import SHORTCUTS
from mgpu.protocol.front.client_messages import GENERATE_RULES

METHODS = ["generate", "stream", "chat", "stream_chat", "map"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_help_lists_each_option_with_its_bounds_and_default(client: type, method: str) -> None:
    text = " ".join(pydoc.render_doc(getattr(client, method), renderer=pydoc.plaintext).split())
    for name in GenerateOptions.__annotations__:
        assert f" {name}: {MEANINGS[name]} (" in text
    assert "n: how many answers (an integer from 1 to 16) [1]" in text
    assert "timeout_s: the request fails after so many seconds" in text
    assert "[that of the client]" in text
    assert "temperature: float = 0.0" in text
    assert "**options" not in text


def test_every_field_that_a_caller_may_set_is_an_option() -> None:
    own = {"id", "prompt", "prompt_ids", "messages", "stream", "session", "keep_s", "emitted_ids"}
    assert set(GenerateOptions.__annotations__) - set(SHORTCUTS) == set(GENERATE_RULES) - own - {"show_markers"}
    assert set(MEANINGS) == set(GenerateOptions.__annotations__)


def test_a_method_is_still_what_it_was() -> None:
    assert inspect.iscoroutinefunction(AsyncClient.generate)
    assert not inspect.iscoroutinefunction(AsyncClient.stream)
    assert "max_in_flight" in inspect.signature(Client.map).parameters


def test_the_client_works_without_docstrings() -> None:
    code = "import mgpu; assert mgpu.Client.generate.__doc__ is None; mgpu.AsyncClient"
    subprocess.run([sys.executable, "-OO", "-c", code], check=True, timeout=60)


def test_no_option_may_be_none(gateway: GatewayProcess) -> None:
    nothing = dict.fromkeys(GenerateOptions.__annotations__)
    with Client(gateway.endpoint) as client:
        assert client.generate([5], **{**nothing, "max_tokens": 2}).token_ids == (5, 5)  # type: ignore[arg-type]


def test_representations_are_short_and_say_what_counts(gateway: GatewayProcess) -> None:
    gateway.engine.script = says("word " * 40)
    client = Client(gateway.endpoint)
    assert repr(client) == f"Client({gateway.endpoint!r})"
    stream = client.stream([1])
    assert repr(stream) == "CompletionStream('', running)"
    stream.completion()
    assert repr(stream) == f"CompletionStream({('word ' * 40)[:57] + '...'!r}, ended)"
    client.close()
    assert repr(client) == f"Client({gateway.endpoint!r}, closed)"


def test_representations_of_the_async_client(gateway: GatewayProcess) -> None:
    async def look() -> list[str]:
        client = AsyncClient(gateway.endpoint)
        async with client:
            stream = client.stream([300])
            shown = [repr(client), repr(stream)]
            with pytest.raises(mgpu.RequestFailed):
                await stream.completion()
            shown.append(repr(stream))
        return [*shown, repr(client)]

    endpoint = repr(gateway.endpoint)
    assert asyncio.run(look()) == [
        f"AsyncClient({endpoint})", "AsyncCompletionStream('', running)", "AsyncCompletionStream('', failed)",
        f"AsyncClient({endpoint}, closed)",
    ]  # fmt: skip
    assert repr(AsyncClient()) == "AsyncClient(None)"


def test_a_notebook_shows_the_text_and_no_html_of_the_model() -> None:
    choice = CompletionChoice(0, "<script>alert(1)</script>\n& more", (1,), None, "stop")
    page = Completion((choice,), Usage(1, 7, 0), "org/<model>", 5)._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n&amp; more" in page
    assert "7 tokens, stop, org/&lt;model&gt;" in page
    assert "<script" not in page
