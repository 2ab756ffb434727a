"""Threads of the gateway are started with it: later the limit of processes may be reached."""

import threading

import pytest

from harness.waiting import eventually
from mgpu.orchestrator.gateway.text.processes.background import NUM_THREADS, BackgroundTasks


def gateway_threads() -> int:
    return sum(thread.name.startswith("gateway-task") for thread in threading.enumerate())


def test_all_threads_run_from_the_start_and_no_task_needs_another(monkeypatch: pytest.MonkeyPatch) -> None:
    before = gateway_threads()
    tasks = BackgroundTasks()
    assert gateway_threads() == before + NUM_THREADS

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[object] = []
    gate = threading.Barrier(NUM_THREADS)
    for _ in range(NUM_THREADS):  # at the same time
        tasks.run(gate.wait, lambda future: done.append(future.result()))
    eventually(lambda: (tasks.deliver_results(), len(done) == NUM_THREADS)[1])
    tasks.close()


def test_a_start_at_the_limit_fails_and_leaves_no_thread_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, started = gateway_threads(), threading.Thread.start, []

    def first_only(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", first_only)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        BackgroundTasks()
    del started[:]
    eventually(lambda: gateway_threads() <= before)  # threads of earlier tests may end meanwhile
