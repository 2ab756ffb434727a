"""Many prompts in one call: the answers keep their order, and errors end it or take the place of an answer."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from harness.servers.gateway_process import BOS, GatewayProcess
from harness.servers.scripted_server import DEADLINE_S, ScriptedServer
from mgpu import AsyncClient, Client, Completion, DeadlineExceeded, MgpuError, RequestFailed, ServerUnreachable
from mgpu.protocol.client.requests.many import AnyPrompt

HI = [{"role": "user", "content": "Hi"}]


def ask(endpoint: str, how: str, prompts: object, **options: object) -> list[Completion | MgpuError]:
    """Call map of one of the clients."""
    settings = {name: options.pop(name) for name in ("connect_timeout_s", "silence_timeout_s") if name in options}
    if how == "sync":
        with Client(endpoint, **settings) as client:  # type: ignore[arg-type]
            return client.map(prompts, **options)  # type: ignore[call-overload,no-any-return]

    async def asked() -> list[Completion | MgpuError]:
        async with AsyncClient(endpoint, **settings) as client:  # type: ignore[arg-type]
            return await client.map(prompts, **options)  # type: ignore[call-overload,no-any-return]

    return asyncio.run(asked())


both = pytest.mark.parametrize("how", ["sync", "async"])


@both
def test_answers_come_in_the_order_of_their_prompts(gateway: GatewayProcess, how: str) -> None:
    answers = ask(gateway.endpoint, how, [[number] * (1 + number % 5) for number in range(200)], max_tokens=2)
    assert [answer.token_ids for answer in answers] == [(number, number) for number in range(200)]  # type: ignore[union-attr]


@both
def test_a_prompt_may_be_text_token_ids_or_a_chat_and_come_from_a_generator(gateway: GatewayProcess, how: str) -> None:
    prompts: list[AnyPrompt] = ["hi", [104, 105], HI]
    answers = ask(gateway.endpoint, how, iter(prompts), max_tokens=2)
    assert [str(answer) for answer in answers] == ["hi", "hi", "u"]
    assert gateway.engine.submits[0].token_ids[:4] == BOS.to_bytes(4, "little")
    assert ask(gateway.endpoint, how, []) == []


@both
def test_no_more_than_max_in_flight_run_together_and_each_end_makes_room(gateway: GatewayProcess, how: str) -> None:
    seen: list[int] = [0]
    in_flight: list[int] = []

    def progress(done: int, total: int | None) -> None:
        assert total == 20
        in_flight.append(len(gateway.engine.submits) - done)
        seen.append(done)

    ask(gateway.endpoint, how, [[1]] * 20, max_in_flight=3, on_progress=progress, max_tokens=5)
    assert seen == list(range(21))
    assert max(in_flight) <= 3
    assert len(gateway.engine.submits) == 20


@both
def test_the_total_of_a_generator_is_not_known(gateway: GatewayProcess, how: str) -> None:
    totals: list[int | None] = []
    prompts = ([number] for number in range(2))
    ask(gateway.endpoint, how, prompts, max_tokens=1, on_progress=lambda _, total: totals.append(total))
    assert totals == [None, None]


@both
def test_a_slow_answer_does_not_keep_others_from_being_asked(gateway: GatewayProcess, how: str) -> None:
    done: list[int] = []
    prompts = [[1] * 3, *[[2]] * 30]  # the first is not done before all others are
    gateway.engine.script = lambda submit: iter([1] * 300) if len(submit.token_ids) > 4 else iter([257])
    ask(gateway.endpoint, how, prompts, max_in_flight=2, max_tokens=300, on_progress=lambda n, _: done.append(n))
    assert len(gateway.engine.submits) == 31
    assert len(done) == 31


@both
def test_the_first_error_ends_all_of_it_and_cancels_what_runs(gateway: GatewayProcess, how: str) -> None:
    gateway.engine.going.clear()
    with pytest.raises(RequestFailed, match="token id 300"):
        ask(gateway.endpoint, how, [[1], [2], [300], [3]], max_tokens=50)
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == len(gateway.engine.submits))


@both
def test_errors_take_the_place_of_answers_if_asked_for(gateway: GatewayProcess, how: str) -> None:
    answers = ask(gateway.endpoint, how, [[1], [300], "", [2]], max_tokens=1, return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == [
        "Completion", "RequestFailed", "RequestFailed", "Completion"
    ]  # fmt: skip


@both
def test_each_prompt_has_its_own_time(gateway: GatewayProcess, how: str) -> None:
    gateway.engine.going.clear()
    answers = ask(gateway.endpoint, how, [[1], [2]], max_in_flight=1, timeout_s=0.2, return_exceptions=True)
    assert [type(answer) for answer in answers] == [DeadlineExceeded] * 2
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 2)


@both
def test_an_error_of_the_callback_ends_it(gateway: GatewayProcess, how: str) -> None:
    def progress(done: int, total: int | None) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(gateway.endpoint, how, [[1]] * 50, max_in_flight=4, max_tokens=2, on_progress=progress)
    gateway.engine.wait(lambda: not gateway.engine._running)


@both
def test_max_in_flight_is_at_least_one(gateway: GatewayProcess, how: str) -> None:
    with pytest.raises(RequestFailed, match="max_in_flight must be at least 1, got 0"):
        ask(gateway.endpoint, how, [[1]], max_in_flight=0)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[ScriptedServer]:
    with closing(ScriptedServer(tmp_path)) as server:
        yield server


@both
def test_a_lost_server_is_not_asked_for_each_prompt_anew(scripted: ScriptedServer, how: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(scripted.hear)
        answers = ask(
            scripted.endpoint, how, [[number] for number in range(100)], max_in_flight=1, silence_timeout_s=0.3,
            return_exceptions=True,
        )  # fmt: skip
        assert acting.result(DEADLINE_S)["type"] == "generate"
    assert [type(answer) for answer in answers] == [ServerUnreachable] * 100
    assert len(set(map(id, answers))) == 1


def test_generate_and_chat_take_lists(gateway: GatewayProcess) -> None:
    async def asked() -> list[Completion]:
        async with AsyncClient(gateway.endpoint) as client:
            return [*await client.generate(["a", "b"], max_tokens=1), *await client.chat([HI], max_tokens=2)]

    with Client(gateway.endpoint) as client:
        assert [str(each) for each in client.generate(("a", "b"), max_tokens=1)] == ["a", "b"]
        assert [each.token_ids for each in client.generate([[5], [6]], max_tokens=1)] == [(5,), (6,)]
        assert [str(each) for each in client.chat([HI, HI], max_tokens=2)] == ["u", "u"]
        with pytest.raises(RequestFailed, match="generate and map take several"):
            client.stream(["a", "b"])  # type: ignore[arg-type]
    assert [str(each) for each in asyncio.run(asked())] == ["a", "b", "u"]
