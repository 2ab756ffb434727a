"""The published clients against a real gateway process."""

import asyncio
import gc
import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder, says
from harness.servers.scripted_server import ScriptedServer
from mgpu import AsyncClient, Client, DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.discovery import LOCK_NAME, RunningServer, write_server


def test_importing_the_client_is_light() -> None:
    code = "import mgpu, sys; mgpu.Client; mgpu.AsyncClient; print(sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "tokenizers", "jinja2", "numpy", "transformers", "click", "psutil"}
    assert not heavy & set(eval(done.stdout, {"__builtins__": {}}))


def test_the_package_offers_what_it_lists_and_nothing_else() -> None:
    import mgpu

    assert all(getattr(mgpu, name) is not None for name in mgpu.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mgpu.nothing


def test_64_interleaved_streams_on_one_client_each_get_their_own(gateway: GatewayProcess) -> None:
    rng = random.Random(5)
    with Client(gateway.endpoint) as client:
        streams = {at: client.stream([at], max_tokens=rng.randint(5, 60), seed=at) for at in range(64)}
        seen: dict[int, list[int]] = {at: [] for at in streams}
        cancelled = set(rng.sample(range(64), 10))
        while streams:
            at = rng.choice(list(streams))
            piece = next(streams[at], None)
            if piece is None:
                del streams[at]
                continue
            seen[at] += piece.token_ids
            if at in cancelled:
                streams.pop(at).close()
        rng = random.Random(5)
        for at in range(64):
            wanted = rng.randint(5, 60)
            assert seen[at] == [at] * (len(seen[at]) if at in cancelled else wanted)
        assert client.stats()["gateway_requests"] == 0


def test_dropping_a_stream_cancels_it(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client:
        for piece in client.stream([1], max_tokens=500):
            assert piece.token_ids == (1,)
            break
        gc.collect()
        gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)
        assert client.generate([2], max_tokens=1).token_ids == (2,)


def test_closing_the_client_ends_what_is_in_flight(gateway: GatewayProcess) -> None:
    client = Client(gateway.endpoint)
    gateway.engine.going.clear()
    stream = client.stream([1], max_tokens=500)
    gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
    client.close()
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 1)
    with pytest.raises(MgpuError, match="closed"):
        next(stream)
    with pytest.raises(MgpuError, match="closed"):
        client.generate([1])


def test_a_stream_returns_the_whole_completion_too(gateway: GatewayProcess) -> None:
    gateway.engine.script = says("hello")
    with Client(gateway.endpoint) as client, client.stream([1], logprobs=0) as stream:
        assert next(stream).text == "h"
        done = stream.completion()
    assert (done.text, done.finish_reason) == ("hello", "stop")
    assert done.logprobs is not None
    assert "".join(entry.text for entry in done.logprobs) == "hello</s>"


def test_n_choices_stream_under_their_index(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client:
        pieces = list(client.stream(list(b"ab"), n=3, max_tokens=4))
    for index in range(3):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == "abab"
        assert [piece.finish_reason for piece in mine][-1] == "length"
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(("prompt", "options", "words"), [
    ("", {}, "prompt must be"),
    ([], {}, "at least one"),
    ([-1], {}, r"prompt\[0\]"),
    (None, {}, "prompt must be text or a sequence of token ids, got NoneType"),
    (5, {}, "prompt must be text or a sequence of token ids, got int"),
    ("a\ud800", {}, "lone surrogate"),
    ("x", {"temperature": float("nan")}, "temperature"),
    ("x", {"temprature": 1}, "did you mean temperature"),
    ("x", {"stop": [""]}, r"stop\[0\]"),
    ("x" * (1 << 20), {}, "the limit is 1048576"),
])  # fmt: skip
def test_wrong_arguments_fail_before_they_are_sent(
    gateway: GatewayProcess, prompt: str, options: dict[str, object], words: str
) -> None:
    with Client(gateway.endpoint) as client:
        with pytest.raises(RequestFailed, match=words) as caught:
            client.generate(prompt, **options)  # type: ignore[arg-type]
        assert caught.value.code == "bad_request"
        assert client.generate([1], max_tokens=1).token_ids == (1,)


def test_deadlines_hold_while_streaming(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint, timeout_s=0.3) as client:
        stream = client.stream([1], max_tokens=5)
        gateway.engine.going.clear()
        with pytest.raises(DeadlineExceeded):
            list(stream)
        gateway.engine.going.set()
        assert client.generate([2], max_tokens=1, timeout_s=20).token_ids == (2,)


def test_no_server_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MGPU_ENDPOINT", raising=False)
    monkeypatch.setenv("MGPU_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ServerUnreachable, match="mgpu-launch serve -m MODEL"):
        Client()
    with pytest.raises(ServerUnreachable, match=r"did not answer within 0\.2 s.*mgpu-launch serve"):
        Client(f"ipc://{tmp_path}/nobody", connect_timeout_s=0.2)
    with pytest.raises(ServerUnreachable, match="not an endpoint"):
        Client("http://localhost:80")


def test_the_endpoint_comes_from_the_environment_else_from_the_running_server(
    gateway: GatewayProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGPU_ENDPOINT", gateway.endpoint)
    with Client() as client:
        assert client.health().state == "ready"
    monkeypatch.delenv("MGPU_ENDPOINT")
    monkeypatch.setenv("MGPU_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "0123abcd"
    folder.mkdir()
    write_server(folder, RunningServer(gateway.endpoint, gateway.process.pid, "tiny", "0"))
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl; f = open({str(folder / LOCK_NAME)!r}, 'w'); fcntl.flock(f, 2);"
         "print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with Client() as client:
            assert client.health().state == "ready"


def test_a_server_that_dies_fails_what_is_in_flight_at_once(tmp_path: Path) -> None:
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.going.clear()
        stream = client.stream([1])
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
        (gateway.runtime_dir / LOCK_NAME).touch()  # nobody holds it: the server itself has ended
        gateway.process.kill()
        with pytest.raises(ServerUnreachable, match="has ended"):
            next(stream)


def test_a_gateway_that_does_not_come_back_is_given_up(tmp_path: Path) -> None:
    with (
        GatewayProcess(make_model_folder(tmp_path)) as gateway,
        Client(gateway.endpoint, silence_timeout_s=1.5) as client,
    ):
        stream = client.stream([1], max_tokens=500)
        next(stream)
        gateway.process.kill()
        with pytest.raises(ServerUnreachable, match="did not come back within"):
            list(stream)


OPTIONS: list[dict[str, Any]] = [
    {"max_tokens": 100}, {"max_tokens": 100, "n": 3, "logprobs": 1}, {"max_tokens": 100, "stop": ["cd" * 30 + "c!"]},
    {"max_tokens": 480, "ignore_eos": True},
]  # fmt: skip


@pytest.mark.parametrize("portion", [1000, 7])
def test_streams_go_on_through_a_gateway_that_was_killed(tmp_path: Path, portion: int) -> None:
    """Whether the record of a request comes in one portion or, while the engine goes on, in many."""
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.portion = portion
        gateway.engine.script = lambda submit: iter("é€cd".encode() * 200)
        for moment in (0, 1, 2, 40, 90):
            streams = [client.stream(list(b"ab"), seed=1, **options) for options in OPTIONS]
            whole = client.stream(list(b"ab"), max_tokens=100, seed=1)
            answers = [stream._request.answer for stream in (whole, *streams)]
            while moment and sum(len(answer.pieces) for answer in answers) < 4 * moment:
                client._wait([1.0])
            gateway.kill()
            gateway.replace()
            expected = ("é€cd" * 200).encode()
            for stream, options in zip(streams, OPTIONS, strict=True):
                done = stream.completion()
                for choice in done.choices:
                    assert bytes(choice.token_ids) == expected[: options["max_tokens"]]
                    assert choice.text == expected[: options["max_tokens"]].decode(errors="replace")
                    assert choice.finish_reason == "length"
                    if "logprobs" in options:
                        assert choice.logprobs is not None
                        assert [entry.token_id for entry in choice.logprobs] == list(choice.token_ids)
                assert done.usage.completion_tokens == options["max_tokens"] * options.get("n", 1)
                assert done.seed == 1
            assert bytes(whole.completion().token_ids) == expected[:100]
        assert len(gateway.engine.submits) == 5 * (len(OPTIONS) + 3)
        assert (gateway.engine.portions > 100) == (portion == 7)


def test_a_stop_string_across_the_splice_is_found(tmp_path: Path) -> None:
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.script = says("abcdef" * 50)
        stream = client.stream([1], max_tokens=300, stop=["fabcdefX", "defabcdefabcdefabcdefabcdefabcdefY", "efab" * 9])
        text = "".join(next(stream).text for _ in range(20))
        gateway.kill()
        gateway.replace()
        text += "".join(piece.text for piece in stream)
        assert text == "abcdef" * 50


def test_a_request_sent_while_no_gateway_is_there_waits_for_the_next(tmp_path: Path) -> None:
    with GatewayProcess(make_model_folder(tmp_path)) as gateway, Client(gateway.endpoint) as client:
        assert client.generate([1], max_tokens=1).token_ids == (1,)
        gateway.kill()
        gateway.replace(wait=False)
        assert client.generate([2], max_tokens=3).token_ids == (2, 2, 2)


def test_async_answers_go_on_through_a_gateway_that_was_killed(tmp_path: Path) -> None:
    async def use(gateway: GatewayProcess) -> None:
        async with AsyncClient(gateway.endpoint) as client:
            tasks = [asyncio.create_task(client.generate([at], max_tokens=200)) for at in range(16)]
            async for _ in client.stream([99], max_tokens=5):
                pass
            gateway.kill()
            gateway.replace()
            answers = await asyncio.gather(*tasks)
        assert [done.token_ids for done in answers] == [(at,) * 200 for at in range(16)]

    with GatewayProcess(make_model_folder(tmp_path)) as gateway:
        asyncio.run(use(gateway))


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    with (
        closing(ScriptedServer(tmp_path)) as mute,
        Client(mute.endpoint, silence_timeout_s=0.2) as client,
        pytest.raises(ServerUnreachable, match="silent"),
    ):
        client.generate([1])


def test_a_peer_that_speaks_something_else_is_reported(tmp_path: Path) -> None:
    with closing(ScriptedServer(tmp_path)) as stranger, Client(stranger.endpoint) as client:
        stream = client.stream([1])
        stranger.hear()
        stranger.send(b"hello")
        with pytest.raises(MgpuError, match="does not speak this protocol"):
            next(stream)


def test_the_async_client_has_the_same_methods(gateway: GatewayProcess) -> None:
    async def use() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            done = await client.generate(list(b"abc"), max_tokens=5)
            assert (done.text, done.usage.completion_tokens) == ("abcab", 5)
            assert "user" in (await client.chat([{"role": "user", "content": "x"}], max_tokens=8)).text
            pieces = [piece async for piece in client.stream(list(b"xy"), max_tokens=3)]
            assert "".join(piece.text for piece in pieces) == "xyx"
            chat = [piece async for piece in client.stream_chat([{"role": "user", "content": "x"}], max_tokens=2)]
            assert chat[-1].usage is not None
            assert (await client.health()).state == "ready"
            assert (await client.models())[0]["name"] == "tiny"
            assert "running" in await client.stats()
            with pytest.raises(RequestFailed, match="vocabulary"):
                await client.generate([300])

    asyncio.run(use())


def test_64_concurrent_async_answers_are_kept_apart(gateway: GatewayProcess) -> None:
    async def use() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            answers = await asyncio.gather(*[client.generate([at], max_tokens=10 + at) for at in range(64)])
        assert [done.token_ids for done in answers] == [(at,) * (10 + at) for at in range(64)]

    asyncio.run(use())


def test_leaving_or_cancelling_an_async_answer_cancels_the_request(gateway: GatewayProcess) -> None:
    async def use() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            async for _ in client.stream([1], max_tokens=500):
                break
            gateway.engine.going.clear()
            task = asyncio.create_task(client.generate([2], max_tokens=500))
            while (await client.stats())["gateway_requests"] == 0:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await client.stats())["gateway_requests"] == 0
            gateway.engine.going.set()
            assert (await client.generate([3], max_tokens=1)).token_ids == (3,)

    asyncio.run(use())
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 2)


def test_async_deadlines_and_unreachable_servers_are_named(gateway: GatewayProcess, tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncClient(gateway.endpoint) as client:
            gateway.engine.going.clear()
            with pytest.raises(DeadlineExceeded):
                await client.generate([1], timeout_s=0.2)
        with pytest.raises(ServerUnreachable, match="mgpu-launch serve"):
            await AsyncClient(f"ipc://{tmp_path}/nobody", connect_timeout_s=0.2).health()

    asyncio.run(use())
