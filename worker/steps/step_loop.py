"""Execute plans as they come, and send the tokens of each step when they are done. Steps overlap.

On a GPU, running a step only launches its work. The step writes the chosen token into its row on the device, and the
next step reads it there: both are on one stream, which keeps their order. So step n + 1 is planned and launched before
the host knows the tokens of step n. Those are copied to pinned memory on a stream of their own, beside step n + 1. For
row 0 with a prompt of 3 tokens:

    plan 1: row 0, start 0, count 3     computes positions 0 to 2, chooses A, writes tokens[0, 3] = A
    plan 2: row 0, start 3, count 1     reads tokens[0, 3] = A, chooses B, writes tokens[0, 4] = B
    plan 3: row 0, start 4, count 1     reads tokens[0, 4] = B, …

    host      launch 1 | launch 2 | wait for A, send it | launch 3 | wait for B, send it | …
    GPU                | step 1           | step 2                 | step 3              | …
    copies                                | A to the host          | B to the host       | …

At most `MAX_IN_FLIGHT` steps are launched but not sent. If A ends the request, step 2 was one token in vain, and the
orchestrator ignores it. With several stages the last one chooses, and the first one must receive the token before it
can compute it: see `ModelRunner`. On a CPU a step is done when its call returns.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import Shutdown, StaySpinning, StepPlan, StepResult, Vocabulary
from mgpu.worker.errors import BadPlan
from mgpu.worker.sampling.sampler import Sampled
from mgpu.worker.steps.control_socket import ControlSocket
from mgpu.worker.steps.model_runner import ModelRunner

MAX_IN_FLIGHT = 2
_SPIN_S = 0.002
"""How long to look for the next order without sleeping."""
_PARK_MS = 1000


@dataclass(slots=True)
class _InFlight:
    """A launched step whose tokens are on their way to the host; ``sampled`` is None if no row chose one."""

    plan: StepPlan
    sampled: Sampled | None
    began_s: float
    ids_host: Tensor
    done: torch.cuda.Event | None

    def is_done(self) -> bool:
        return self.done is None or self.done.query()  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the tokens and return the message."""
        if self.done is not None:
            self.done.synchronize()
        token_ids: list[int] = self.ids_host.tolist()
        logprobs = self.sampled.logprob_list() if self.sampled is not None else None
        failures = self.sampled.failures if self.sampled is not None else []
        compute_us = int((time.monotonic() - self.began_s) * 1e6)
        return StepResult(self.plan.epoch, self.plan.step, token_ids, logprobs, compute_us, failures or None)


class StepLoop:
    """The loop of one worker. ``reports`` is true on the output rank, which alone sends results."""

    def __init__(self, runner: ModelRunner, control: ControlSocket, device: torch.device, reports: bool) -> None:
        self._runner = runner
        self._control = control
        self._reports = reports
        self._on_gpu = on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu and reports else None  # type: ignore[no-untyped-call]
        self._in_flight: deque[_InFlight] = deque()

    def run(self) -> None:
        """Execute plans until `Shutdown`, then send the results that are left."""
        while True:
            order = self._next_order()
            if isinstance(order, Shutdown):
                break
            if isinstance(order, Vocabulary):
                self._runner.use_vocabulary(order)
                continue
            if not isinstance(order, StepPlan):
                raise BadPlan(f"{type(order).__name__} while steps are running")
            self._step(order)
        self._send_results(keep=0)

    def _step(self, plan: StepPlan) -> None:
        began_s = time.monotonic()
        self._send_results(keep=MAX_IN_FLIGHT - 1)
        sampled = self._runner.run(plan)
        # Steps without a chosen token are reported too: results pace the orchestrator.
        if plan.rows and self._reports:
            self._in_flight.append(self._read_back(plan, sampled, began_s))
        if not self._on_gpu:
            self._send_results(keep=0)

    def _read_back(self, plan: StepPlan, sampled: Sampled | None, began_s: float) -> _InFlight:
        """Start copying the tokens to the host, beside the next step's work."""
        if sampled is None:
            done = _new_event() if self._on_gpu else None
            if done is not None:
                done.record()
            return _InFlight(plan, None, began_s, torch.empty(0, dtype=torch.int32), done)
        if self._copies is None:
            return _InFlight(plan, sampled, began_s, sampled.ids_S, None)
        ids_host = torch.empty(sampled.ids_S.shape, dtype=sampled.ids_S.dtype, pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            ids_host.copy_(sampled.ids_S, non_blocking=True)
            sampled.ids_S.record_stream(self._copies)
            done = _new_event()
            done.record()
        return _InFlight(plan, sampled, began_s, ids_host, done)

    def _send_results(self, keep: int) -> None:
        """Send the results that are done; wait for more of them until at most ``keep`` steps are in flight."""
        while self._in_flight and (len(self._in_flight) > keep or self._in_flight[0].is_done()):
            result = self._in_flight.popleft().result()
            self._runner.check_peers()
            self._control.send(result)

    def _next_order(self) -> object:
        """Wait for an order and send results meanwhile: spin while a result or an order may come soon, then sleep.

        Sleeping for ever is safe: the end of the orchestrator ends this process (see __main__.py).
        """
        began_s = time.monotonic()
        while True:
            busy = bool(self._in_flight) or (self._on_gpu and time.monotonic() - began_s < _SPIN_S)
            order = self._control.receive(0 if busy else _PARK_MS)
            if isinstance(order, StaySpinning):
                began_s = time.monotonic()
            elif order is not None:
                return order
            self._send_results(keep=MAX_IN_FLIGHT)


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
