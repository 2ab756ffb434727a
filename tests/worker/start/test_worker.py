"""Workers as processes: their life from the spec to the last step, and every way in which it ends."""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from harness.models.tiny_models import TinyModel
from harness.servers.fake_orchestrator import DEADLINE_S, Workers, launch, running
from harness.specs import make_spec
from harness.waiting import eventually
from mgpu.protocol.internal.process.child import WAKE_UP, frame_spec
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Loaded,
    LoadProgress,
    NewRow,
    Ready,
    RowSampling,
    Shutdown,
    StaySpinning,
    StepPlan,
    StepResult,
    WorkerFailure,
)

MakeModel = Callable[[str], TinyModel]


def new_row(row: int, ids: list[int], block_ids: list[int], sampling: RowSampling | None = None) -> NewRow:
    data = struct.pack(f"<{len(ids)}i", *ids)
    return NewRow(row, data, len(ids), block_ids, sampling or RowSampling())


def step_of(step: int, rows: list[int], starts: list[int], counts: list[int], **changes: object) -> StepPlan:
    plan = StepPlan(7, step, [], [], [], [], rows, starts, counts, [1] * len(rows))
    return replace(plan, **changes)


def result_of(workers: Workers) -> StepResult:
    result = workers.expect(workers.spec.layout.placement.output_rank, StepResult)
    assert isinstance(result, StepResult)
    return result


def failure_of(workers: Workers, rank: int) -> WorkerFailure:
    failure = workers.expect(rank, WorkerFailure)
    assert isinstance(failure, WorkerFailure)
    return failure


LAYOUTS = [
    ([2], "shared-memory", "llama"), ([1, 2], "shared-memory", "gemma3"), ([2, 1, 1], "shared-memory", "llama"),
    ([2, 2], "gloo", "llama"),
]  # fmt: skip
"""Ranks of each stage; gemma3 has layers with windows."""


@pytest.mark.parametrize(("sizes", "transport", "family"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same_tokens(
    tiny_model: MakeModel, tmp_path: Path, sizes: list[int], transport: str, family: str
) -> None:
    model = tiny_model(family)
    with running(make_spec(model.folder, sizes, transport), tmp_path) as workers:
        workers.make_ready()
        assert (workers.num_pages > 0) == (family == "gemma3")
        assert workers.generate(model.prompt_ids, len(model.output_ids)) == model.output_ids
        if transport == "shared-memory":
            assert not any(psutil.Process(each.pid).net_connections() for each in workers.processes)
        workers.shut_down()


def test_one_worker_lives_through_its_phases(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with running(make_spec(model.folder, [1]), tmp_path) as workers:
        workers.make_ready()
        assert workers.generate(model.prompt_ids, len(model.output_ids)) == model.output_ids
        check_epochs(workers)
        check_overlap(workers, model)
        check_signals(workers)
        workers.shut_down()
    ready = next(message for message in workers.seen if isinstance(message, Ready))
    assert list(ready.phase_s) == ["rendezvous", "weights", "cache", "warmup"]
    assert ready.loaded_bytes > 0
    loaded = next(message for message in workers.seen if isinstance(message, Loaded))
    assert loaded.weight_bytes >= ready.loaded_bytes
    progress = [message for message in workers.seen if isinstance(message, LoadProgress)]
    assert {message.phase for message in progress} == set(ready.phase_s)
    assert any(message.done_bytes == message.total_bytes == ready.loaded_bytes for message in progress)


def check_epochs(workers: Workers) -> None:
    """Orders of another epoch are ignored, and so is the message that steps may come soon."""
    workers.send(replace(step_of(90, [0], [0], [1]), epoch=6))
    workers.send(Shutdown(6))
    workers.send(AllocateCache(8, 1))
    workers.send(StaySpinning(workers.spec.epoch))
    plan = step_of(91, [0], [0], [3], new_rows=[new_row(0, [5, 6, 7], [0])])
    assert workers.step(plan).step == 91


def check_overlap(workers: Workers, model: TinyModel) -> None:
    """Plans are sent ahead of results; sampled tokens feed the next step, and blocks are appended on the way."""
    count = len(model.output_ids)
    prompt = model.prompt_ids
    held = -(-len(prompt) // 16)
    workers.send(step_of(100, [2], [0], [len(prompt)], new_rows=[new_row(2, prompt, [*range(held)])], free_rows=[0]))
    for index in range(1, count):
        start = len(prompt) + index - 1
        appended = ([2], [start // 16]) if start % 16 == 0 else ([], [])
        workers.send(step_of(100 + index, [2], [start], [1], block_rows=appended[0], block_ids=appended[1]))
    results = [result_of(workers) for _ in range(count)]
    assert [result.step for result in results] == [100 + index for index in range(count)]
    assert [id_ for result in results for id_ in result.token_ids] == model.output_ids


def check_signals(workers: Workers) -> None:
    """A worker ignores Ctrl-C, which reaches the whole foreground group, and prints its stacks at SIGUSR1."""
    workers.processes[0].send_signal(signal.SIGINT)
    workers.processes[0].send_signal(signal.SIGUSR1)
    plan = step_of(200, [0, 1], [0, 0], [3, 2], new_rows=[new_row(0, [5, 6, 7], [0]), new_row(1, [8, 9], [1])])
    assert len(workers.step(replace(plan, free_rows=[2])).token_ids) == 2


def test_two_stages_keep_rows_apart_when_one_changes_hands(tiny_model: MakeModel, tmp_path: Path) -> None:
    """A token of a freed row that reaches the first stage late must not end up in the row's next request."""
    model = tiny_model("llama")
    prompt, expected = model.prompt_ids, model.output_ids
    blocks = [*range(-(-(len(prompt) + 4) // 16))]
    with running(make_spec(model.folder, [1, 1]), tmp_path) as workers:
        workers.make_ready()
        last = len(prompt) - 1
        others = [blocks[-1] + 1 + block for block in blocks]
        workers.send(step_of(1, [0], [0], [last], new_rows=[new_row(0, prompt[:0:-1], others)]))
        row = new_row(0, prompt, blocks)
        workers.send(step_of(2, [0], [0], [last], free_rows=[0], new_rows=[row], samples=[0]))
        # Step 3 hears of step 1's token, for the last position of the prompt of what is now another request.
        workers.send(step_of(3, [0], [last], [1]))
        for index in range(3):
            workers.send(step_of(5 + 2 * index, [0], [len(prompt) + index], [1]))
        results = [result_of(workers) for _ in range(6)]
        assert [result.token_ids for result in results[2:]] == [[id_] for id_ in expected[:4]]
        workers.shut_down()


def test_a_worker_ends_when_standard_input_does(tiny_model: MakeModel, tmp_path: Path) -> None:
    with running(make_spec(tiny_model("llama").folder, [2]), tmp_path) as workers:
        workers.make_ready()
        for process in workers.processes:
            process.close_input()
        began_s = time.monotonic()
        assert 0 not in workers.wait_all(DEADLINE_S)
        assert time.monotonic() - began_s < 10.0


def test_a_standby_has_torch_before_its_spec_and_ends_with_standard_input() -> None:
    process = subprocess.Popen([sys.executable, "-m", "mgpu.worker", "--standby", "cpu"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    try:
        eventually(lambda: reads_stdin(process.pid), "it does not read its spec")
        assert "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        process.stdin.write(WAKE_UP)
        process.stdin.flush()
        eventually(lambda: reads_stdin(process.pid), "it does not read its spec after it was woken up")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 2
    finally:
        process.kill()
        process.stdin.close()
        process.wait(DEADLINE_S)


START_AND_WAIT = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", "mgpu.worker"])
print(worker.pid, flush=True)
worker.wait()
"""


def test_a_worker_ends_with_its_parent_even_if_standard_input_stays_open() -> None:
    read_end, write_end = os.pipe()
    parent = subprocess.Popen([sys.executable, "-c", START_AND_WAIT], stdin=read_end, stdout=subprocess.PIPE)
    os.close(read_end)
    assert parent.stdout is not None
    with parent.stdout:
        worker = psutil.Process(int(parent.stdout.readline()))
        # It reads its spec, so it has asked for its death with the parent's before.
        eventually(lambda: reads_stdin(worker.pid), "it does not read its spec")
        parent.kill()
        parent.wait(DEADLINE_S)
    try:
        worker.wait(2.0)
    finally:
        os.close(write_end)


def reads_stdin(pid: int) -> bool:
    number, descriptor, *_ = [*Path(f"/proc/{pid}/syscall").read_text().split(), ""]
    is_worker = b"mgpu.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return is_worker and (number, descriptor) == ("0", "0x0")


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (b"", "standard input ended after 0 of 4 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "announces a spec of 542393671 bytes"),
        (frame_spec(b"\xff\x00 no message"), "not a worker spec: malformed"),
        (frame_spec(CONTROL.encode(Shutdown(1))), "expected a worker spec, got Shutdown"),
        (frame_spec(b"\x93\x00\x01\x02"), "not a worker spec: WorkerSpec has"),
        (struct.pack("<I", 100) + b"abc", "ended after 3 of 100 bytes"),
    ],
    ids=["nothing", "http", "garbage", "other-message", "too-few-fields", "cut-off"],
)
def test_garbage_on_standard_input_is_a_clear_error(sent: bytes, complaint: str) -> None:
    process = launch(0, 1)
    _, errors = process.communicate(sent, timeout=DEADLINE_S)
    assert process.returncode == 2
    assert errors.decode().startswith("mgpu worker: ")
    assert complaint in errors.decode()
    assert errors.count(b"\n") == 1


def test_a_world_of_another_size_is_refused(tiny_model: MakeModel) -> None:
    process = launch(3, 2)
    spec = frame_spec(CONTROL.encode(make_spec(tiny_model("llama").folder, [1])))
    _, errors = process.communicate(spec, timeout=DEADLINE_S)
    assert process.returncode == 2
    assert errors.decode() == "mgpu worker: RANK=3 and WORLD_SIZE=2 do not fit a plan of 1 ranks\n"


def test_ranks_of_an_outside_launcher_meet_at_the_address_of_the_first(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running(make_spec(model.folder, [2], "gloo"), tmp_path, port) as workers:
        workers.make_ready()
        assert workers.generate(model.prompt_ids, 4) == model.output_ids[:4]
        workers.shut_down()


@pytest.mark.parametrize("transport", ["shared-memory", "gloo"])
def test_ranks_that_lose_a_peer_say_so_before_the_deadline(
    tiny_model: MakeModel, tmp_path: Path, transport: str
) -> None:
    spec = make_spec(tiny_model("llama").folder, [2], transport, worker_timeout_s=2.0)
    with running(spec, tmp_path) as workers:
        workers.make_ready()
        workers.processes[1].send_signal(signal.SIGKILL)
        workers.processes[1].wait(DEADLINE_S)
        began_s = time.monotonic()
        workers.send(step_of(1, [0], [0], [3], new_rows=[new_row(0, [5, 6, 7], [0])]), ranks=[0])
        failure = failure_of(workers, 0)
        assert workers.processes[0].wait(DEADLINE_S) == 1
        assert time.monotonic() - began_s < 8.0
    assert (failure.rank, failure.phase) == (0, "steps")
    assert failure.message.startswith("PeerLost: ")
    assert "Traceback" in failure.traceback
    assert 0 < failure.at_s <= time.monotonic()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_rows": [new_row(0, [1, 2, 3], [10_000])]}, "BadPlan: blocks 10000..10000 in a pool of"),
        ({"new_rows": [new_row(0, [1, 2, 3], [])]}, "BadPlan: row 0 reaches 3 tokens with 0 blocks"),
    ],
    ids=["no-such-block", "no-block"],
)
def test_an_impossible_plan_ends_the_worker_with_its_reason(
    tiny_model: MakeModel, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with running(make_spec(tiny_model("llama").folder, [1]), tmp_path) as workers:
        workers.make_ready()
        workers.send(step_of(1, [0], [0], [3], **changes))
        failure = failure_of(workers, 0)
        assert workers.processes[0].wait(DEADLINE_S) == 1
    assert failure.message.startswith(message)


def test_weights_that_vanished_end_the_load_with_their_name(tiny_model: MakeModel, tmp_path: Path) -> None:
    spec = make_spec(tiny_model("llama").folder, [1])
    spec = replace(spec, model=replace(spec.model, path=str(tmp_path / "gone")))
    with running(spec, tmp_path) as workers:
        failure = failure_of(workers, 0)
        assert workers.processes[0].wait(DEADLINE_S) == 1
    assert failure.phase == "weights"
    assert failure.is_mistake
    assert failure.traceback == ""
    assert "gone" in failure.message


def test_a_pool_without_room_for_a_block_is_refused_with_the_numbers(tiny_model: MakeModel, tmp_path: Path) -> None:
    spec = make_spec(tiny_model("llama").folder, [1], kv_memory=100)
    with running(spec, tmp_path) as workers:
        failure = failure_of(workers, 0)
    assert failure.message.startswith("0 MiB are left for the KV cache and one block of 16 tokens takes")


def test_shutdown_before_the_pool_is_allocated_is_orderly(tiny_model: MakeModel, tmp_path: Path) -> None:
    with running(make_spec(tiny_model("llama").folder, [1, 1], "gloo"), tmp_path) as workers:
        for rank in range(2):
            workers.expect(rank, Loaded)
        workers.shut_down()


def test_random_weights_need_only_a_config(tiny_model: MakeModel, tmp_path: Path) -> None:
    spec = make_spec(tiny_model("qwen3").folder, [2])
    spec = replace(spec, model=replace(spec.model, load_format="dummy"))
    with running(spec, tmp_path) as workers:
        workers.make_ready()
        assert len(workers.generate([1, 2, 3], 3, RowSampling(temperature=1.0, seed=5))) == 3
        workers.shut_down()
