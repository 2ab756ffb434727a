"""A worker process without torch: speaks CONTROL, executes plans on the fake model, fails on demand.

FAKE_WORKER in the environment is a JSON map: ``num_blocks`` per rank; ``step_s``: seconds per step; ``fail``: "exit",
"sigkill", "raise", "garbage", "capture" (a sum in a graph did not end) or "hang", at ``fail_rank`` in ``fail_phase``
("rendezvous", "weights" or "steps", there at step ``fail_step``) of every epoch in ``fail_epochs`` (all);
``peers_fail``: the other ranks raise at that step, 50 ms later, as if a collective had lost its peer; ``peers_end``:
they end silently instead, by "abort" or "exit"; ``poison``: a token that no worker survives; ``stale``: send results
of the epoch before too; ``late_blocks``: ``num_blocks`` of every later epoch; ``load_s``: seconds that weights take;
``fail_captured``: fail only while sums of NCCL may be captured.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from array import array
from typing import Any

import zmq

from harness.servers.fake_model import FakeModel
from mgpu.protocol.internal.host_socket import use_host_options
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Loaded,
    LoadProgress,
    Ready,
    Shutdown,
    StaySpinning,
    StepPlan,
    StepResult,
    TokenLogprobs,
    WorkerFailure,
    WorkerSpec,
)
from mgpu.protocol.keys import ClientKeys, public_of

OPTIONS: dict[str, Any] = json.loads(os.environ.get("FAKE_WORKER", "{}"))
RANK = int(os.environ["RANK"])
EPOCH = 0
CAPTURES = True


class InjectedFailure(Exception):
    pass


def read_spec() -> WorkerSpec:
    while (size := int.from_bytes(sys.stdin.buffer.read(4), "little")) == 0:
        print("woken up", file=sys.stderr, flush=True)
    spec = CONTROL.decode(sys.stdin.buffer.read(size))
    assert isinstance(spec, WorkerSpec)
    return spec


def leave_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(3)


def fail_if_asked(phase: str, step: int = 0) -> None:
    if OPTIONS.get("fail_phase") != phase or step < OPTIONS.get("fail_step", 0):
        return
    if EPOCH not in OPTIONS.get("fail_epochs", [EPOCH]) or (OPTIONS.get("fail_captured") and not CAPTURES):
        return
    if OPTIONS.get("fail_rank", 0) != RANK:
        if how := OPTIONS.get("peers_end"):
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGABRT) if how == "abort" else os._exit(7)
        if OPTIONS.get("peers_fail"):
            time.sleep(0.05)
            raise InjectedFailure(f"rank {RANK} lost its peer")
        return
    match OPTIONS["fail"]:
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(7)
        case "garbage":
            pass  # see FakeWorker.step
        case "hang":
            threading.Event().wait(600)
        case _:
            raise InjectedFailure(f"rank {RANK} was told to fail")


class FakeWorker:
    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.phase = "spawn"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 1000)
        if (joined := spec.joined) is not None:
            use_host_options(
                self.socket, joined.identity, ClientKeys(joined.secret, public_of(joined.secret), joined.server_key)
            )
        self.socket.connect(spec.endpoint)
        if spec.shared_fd >= 0:
            assert os.fstat(spec.shared_fd).st_size == spec.shared_bytes

    def send(self, message: object) -> None:
        self.socket.send(CONTROL.encode(message))

    def run(self) -> None:
        spec = self.spec
        for phase in ("rendezvous", "weights"):
            self.phase = phase
            self.send(LoadProgress(spec.epoch, RANK, phase, 50, 100, 0.1))
            fail_if_asked(phase)
        time.sleep(OPTIONS.get("load_s", 0.0))
        blocks = OPTIONS.get("late_blocks" if spec.epoch and "late_blocks" in OPTIONS else "num_blocks")
        num_blocks = (blocks or [64] * spec.layout.placement.world_size)[RANK]
        self.send(Loaded(spec.epoch, RANK, num_blocks, 1024, 100, 1 << 20))
        allocate = CONTROL.decode(self.socket.recv())
        assert isinstance(allocate, AllocateCache)
        self.model = FakeModel(allocate.num_blocks, spec.limits.block_size, spec.layout.placement.num_stages)
        phases = {"rendezvous": 0.1, "weights": 0.5, "cache": 0.0, "warmup": 0.1}
        self.send(Ready(spec.epoch, RANK, phases, 100, [f"note of rank {RANK}"]))
        self.phase = "steps"
        while not isinstance(message := CONTROL.decode(self.socket.recv()), Shutdown):
            if isinstance(message, StaySpinning):
                print(f"worker {RANK} stays awake", file=sys.stderr, flush=True)
            else:
                self.step(message)

    def step(self, plan: StepPlan) -> None:
        fail_if_asked("steps", plan.step)
        for row in plan.new_rows:
            if OPTIONS.get("poison") in array("i", row.token_ids):
                os._exit(11)
        tokens = self.model.execute(plan)
        if "step_s" in OPTIONS:
            time.sleep(OPTIONS["step_s"])
        if self.spec.layout.placement.output_rank == RANK:
            wants = OPTIONS.get("logprobs")
            logprobs = [TokenLogprobs(-0.5, [token], [-0.5]) for token in tokens] if wants else None
            if OPTIONS.get("fail") == "garbage" and EPOCH == 0 and plan.step >= OPTIONS["fail_step"]:
                tokens = [*tokens, 1]
            if OPTIONS.get("stale"):
                self.send(StepResult(EPOCH - 1, plan.step, [0] * len(tokens), None, 10))
            self.send(StepResult(self.spec.epoch, plan.step, tokens, logprobs, 10))  # type: ignore[arg-type]


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    spec = read_spec()
    globals().update(EPOCH=spec.epoch, CAPTURES=spec.captures_library)
    threading.Thread(target=leave_at_end_of_stdin, daemon=True).start()
    worker = FakeWorker(spec)
    try:
        worker.run()
    except InjectedFailure as error:
        at_s = time.monotonic()
        is_mistake = OPTIONS["fail"] == "mistake"
        text = "" if is_mistake else "Traceback (most recent call last):\n  InjectedFailure"
        in_capture = OPTIONS["fail"] == "capture"
        worker.send(WorkerFailure(spec.epoch, RANK, worker.phase, str(error), text, at_s, is_mistake, in_capture))
        return 1
    finally:
        worker.socket.close()
        worker.context.term()
    return 0


if __name__ == "__main__":
    sys.exit(main())
