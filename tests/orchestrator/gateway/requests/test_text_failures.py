"""A tokenizer that fails, or panics, at a token of an answer costs that request only."""

import errno
import logging
import math
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.servers.resuming_gateway import A, B, ResumingGateway, record
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests import request_handler
from mgpu.orchestrator.gateway.requests.prompts import Prompts
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.text_pace import TextPace
from mgpu.orchestrator.gateway.text.processes.encoder_process import EncoderFailed
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.internal.gateway_messages import Outputs
from mgpu.protocol.internal.process.bounded_log import BoundedLog


class LibraryPanic(BaseException):
    """Stands for pyo3's PanicException, which cannot be made from Python."""


class FailingCodec:
    def __init__(self, failure: type[BaseException]) -> None:
        self._failure = failure

    def shown_bytes(self, token_id: int) -> bytes:
        if token_id == 66:
            raise self._failure("no such piece")
        return b"x"


def failing_gateway(failure: type[BaseException] = LibraryPanic) -> ResumingGateway:
    gateway = ResumingGateway()
    cast("Any", gateway.resumptions)._requests._model.codec = FailingCodec(failure)
    return gateway


def step(*tokens: tuple[int, int]) -> Outputs:
    """Return one engine step; each token is the number of its sequence and its id."""
    n = len(tokens)
    ids = [[token] for _, token in tokens]
    return Outputs([number for number, _ in tokens], ids, [[]] * n, [""] * n, [""] * n, [0] * n)


@pytest.mark.parametrize("failure", [LibraryPanic, ValueError])
def test_a_token_without_text_fails_its_request_and_the_others_go_on(failure: type[BaseException]) -> None:
    gateway = failing_gateway(failure)
    gateway.resume(A, session="a")
    gateway.resume(B, session="b")
    gateway.answer(0, record(7))
    gateway.answer(1, record(8))
    cast("Any", gateway.resumptions)._requests.on_outputs(step((7, 66), (8, 5)))
    assert gateway.heard(A)[2:] == ["engine_error"]
    assert gateway.cancelled == [7]
    [request] = gateway.table
    assert (request.connection, request.choices[0].num_tokens) == (B, 3)


def test_a_replayed_token_without_text_fails_its_request() -> None:
    gateway = failing_gateway()
    gateway.resume(A)
    gateway.answer(0, record(7, tokens=(5, 66)))
    assert gateway.heard(A) == ["resumed", "accepted", "engine_error"]
    assert gateway.cancelled == [7]
    assert len(gateway.table) == 0


@pytest.mark.parametrize("signal", [SystemExit, KeyboardInterrupt])
def test_signals_to_stop_go_on(signal: type[BaseException]) -> None:
    gateway = failing_gateway(signal)
    gateway.resume(A)
    with pytest.raises(signal):
        gateway.answer(0, record(7, tokens=(66,)))


class Unreadable:
    def __getattr__(self, name: str) -> object:
        raise KeyError("bug")


@pytest.mark.parametrize(("failure", "code", "words"), [
    (BlockingIOError(errno.EAGAIN, "x"), "overloaded", "the limit of processes is reached (ulimit -u"),
    (EncoderFailed("no process for texts could be started"), "overloaded", "no process for texts"),
    (KeyError("bug"), "engine_error", "internal error"),
    (None, "engine_error", "internal error"),
])  # fmt: skip
def test_a_failure_of_the_server_is_not_told_as_one_of_the_request(
    failure: Exception | None, code: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    refused: list[Refusal] = []
    prompts = object.__new__(Prompts)
    log = BoundedLog(logging.getLogger("test"), logging.ERROR)
    requests = SimpleNamespace(
        table=SimpleNamespace(remove=lambda request: None),
        refuse=lambda connection, request_id, refusal: refused.append(refusal),
    )
    for name, value in (("_requests", requests), ("_bug_log", log), ("_limit_log", log)):
        setattr(prompts, name, value)
    future: Future[Any] = Future()
    if failure is None:  # the text is there, and admitting the request fails
        future.set_result(Unreadable())
    else:
        future.set_exception(failure)
    prompts._finish(cast("Any", SimpleNamespace(connection=A, id=1, is_encoding=True)), future)
    assert [(each.code, words in str(each)) for each in refused] == [(code, True)]
    assert (refused[0].retry_after_s is not None) == (code == "overloaded")
    assert ("KeyError: 'bug'" in caplog.text) == (code == "engine_error")


def test_a_request_that_fails_while_it_is_submitted_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = ResumingGateway()
    requests = cast("Any", gateway.resumptions)._requests

    def fail(*_: object) -> bytes:
        raise KeyError("bug")

    monkeypatch.setattr(request_handler, "pack_context", fail)
    spec = Generate(1, prompt_ids=int32_bytes([1, 2]), session="s", max_tokens=3, n=2)
    with pytest.raises(KeyError):
        requests.admit(Request(A, spec, 0.0, None), spec.prompt_ids)
    assert len(gateway.table) == 0
    assert len(gateway.cancelled) == 2


def test_the_input_of_a_request_that_was_submitted_is_not_kept() -> None:
    gateway = ResumingGateway()
    prompt = int32_bytes([1, 2])
    spec = Generate(1, prompt_ids=prompt, logit_bias=((1, 0.5),), session="s", max_tokens=3, n=2, stream=True)
    cast("Any", gateway.resumptions)._requests.admit(request := Request(A, spec, 0.0, None), prompt)
    assert (request.spec.prompt_ids, request.spec.logit_bias) == (None, ())
    assert (request.spec.session, request.spec.n, request.spec.stream) == ("s", 2, True)


class FakePrompts:
    """Prompts whose texts are names. They end when a test says so. Each owner has two requests in flight."""

    def __init__(self, num_cores: int, owners: int) -> None:
        self.started: list[tuple[str, Any]] = []
        self.clock_s = 100.0
        self.prompts = object.__new__(Prompts)
        quota = SimpleNamespace(usage_of_owner=lambda owner: SimpleNamespace(requests=2))
        table = FakeTable(2 * owners, quota)
        tasks = SimpleNamespace(run=lambda work, finish: self.started.append((work(), finish)))
        for name, value in (
            ("_turns", FairTurns()), ("_running_of", Counter()), ("_slow", set()), ("_num_running", 0),
            ("_background", tasks), ("_encoders", SimpleNamespace(do=lambda task: task)),
            ("_task_of", lambda request: request), ("_has_ended", lambda request: False), ("_finish", lambda *_: None),
            ("_requests", SimpleNamespace(table=table)), ("_pace", TextPace(num_cores, lambda: self.clock_s)),
        ):  # fmt: skip
            setattr(self.prompts, name, value)

    def put(self, owner: str, count: int = 1) -> None:
        for number in range(count):
            self.prompts._turns.put((owner, f"connection {number}"), cast("Any", owner))
        self.prompts._start_next()

    def finish(self, cpu_s: float) -> None:
        future: Future[Any] = Future()
        future.set_result(SimpleNamespace(cpu_s=cpu_s))
        self.clock_s += cpu_s
        self.started.pop(0)[1](future)

    @property
    def running(self) -> list[str]:
        return [name for name, _ in self.started]


class FakeTable(SimpleNamespace):
    def __init__(self, count: int, quota: object) -> None:
        super().__init__(count=count, quota=quota)

    def __len__(self) -> int:
        return cast("int", self.count)


@pytest.mark.parametrize("num_cores", [1, 8])
def test_an_owner_with_slow_texts_leaves_a_process_to_others(num_cores: int) -> None:
    """On ipc each of its connections is an account, and five of them had both processes."""
    fake = FakePrompts(num_cores, owners=1)
    fake.put("slow", 6)
    assert fake.running == ["slow", "slow"], "until it is known"
    fake.finish(1.0)
    assert fake.running == ["slow"]
    fake.put("other")
    assert fake.running == ["slow", "other"]
    fake.finish(1.0)
    assert fake.running == ["other", "slow"]
    fake.finish(0.001)
    fake.finish(0.001)
    assert fake.running == ["slow", "slow"], "quick texts have all processes"


def test_on_few_cores_costly_texts_wait_for_their_time_and_are_begun_then() -> None:
    fake = FakePrompts(1, owners=2)
    fake.put("costly", 6)
    fake.finish(0.2)
    fake.finish(0.2)
    assert fake.running == [], "one was beyond what an owner has free, and the other beyond what such owners have"
    wait_s = fake.prompts.wait_s()
    assert 0.5 < wait_s < 2.5
    fake.put("quick")
    assert fake.running == ["quick"]
    fake.prompts.begin_paused()
    assert fake.running == ["quick"]
    fake.clock_s += wait_s + 1e-3
    fake.prompts.begin_paused()
    assert fake.running == ["quick", "costly"]
    assert fake.prompts.wait_s() == math.inf


@pytest.mark.parametrize(("num_cores", "owners"), [(1, 1), (3, 2)])
def test_nobody_waits_without_company_or_with_cores_to_spare(num_cores: int, owners: int) -> None:
    fake = FakePrompts(num_cores, owners)
    fake.put("costly", 6)
    for _ in range(3):
        fake.finish(2.0)
    assert fake.running == ["costly"]
