"""Execute plans as they come and report tokens as they are done.

On a GPU a step is only launched here: its tokens are copied to pinned memory behind it and sent when they are there,
while the next step already runs. On CPU a step is done when its call returns.
"""

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import Shutdown, StaySpinning, StepPlan, StepResult
from mgpu.worker.control_socket import ControlSocket
from mgpu.worker.errors import BadPlan
from mgpu.worker.sampling.sampler import Sampled
from mgpu.worker.steps.model_runner import ModelRunner

MAX_IN_FLIGHT = 2
_SPIN_S = 0.002
_PARK_MS = 1000


@dataclass(slots=True)
class _InFlight:
    """A launched step whose tokens are on their way to the host; ``sampled`` is None if it only prefilled."""

    plan: StepPlan
    sampled: Sampled | None
    began_s: float
    ids_host: Tensor
    done: torch.cuda.Event | None

    def is_done(self) -> bool:
        return self.done is None or self.done.query()  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        """Wait for the tokens, if need be, and give the message."""
        if self.done is not None:
            self.done.synchronize()
        token_ids: list[int] = self.ids_host.tolist()
        logprobs = self.sampled.logprob_list() if self.sampled is not None else None
        compute_us = int((time.monotonic() - self.began_s) * 1e6)
        return StepResult(self.plan.epoch, self.plan.step, token_ids, logprobs, compute_us)


class StepLoop:
    """The loop of one worker; ``reports`` is true on the output rank, the only one that sends results."""

    def __init__(self, runner: ModelRunner, control: ControlSocket, device: torch.device, reports: bool) -> None:
        self._runner = runner
        self._control = control
        self._reports = reports
        self._on_gpu = device.type == "cuda"
        self._copies = _side_stream(device) if self._on_gpu and reports else None
        self._in_flight: deque[_InFlight] = deque()

    def run(self) -> None:
        """Return when told to shut down, with all results sent."""
        while True:
            order = self._next_order()
            if isinstance(order, Shutdown):
                break
            if not isinstance(order, StepPlan):
                raise BadPlan(f"{type(order).__name__} while steps are running")
            self._step(order)
        self._send_results(keep=0)

    def _step(self, plan: StepPlan) -> None:
        began_s = time.monotonic()
        self._send_results(keep=MAX_IN_FLIGHT - 1)
        sampled = self._runner.run(plan)
        # Steps that only prefill are reported too: results are what paces the orchestrator.
        if plan.rows and self._reports:
            self._in_flight.append(self._read_back(plan, sampled, began_s))
        if not self._on_gpu:
            self._send_results(keep=0)

    def _read_back(self, plan: StepPlan, sampled: Sampled | None, began_s: float) -> _InFlight:
        """Start copying the tokens to the host beside the next step's work."""
        if sampled is None:
            done = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
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
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return _InFlight(plan, sampled, began_s, ids_host, done)

    def _send_results(self, keep: int) -> None:
        """Send what is done, and wait for more until at most ``keep`` steps are in flight."""
        while self._in_flight and (len(self._in_flight) > keep or self._in_flight[0].is_done()):
            result = self._in_flight.popleft().result()
            self._runner.check_peers()
            self._control.send(result)

    def _next_order(self) -> object:
        """Wait for an order, sending results meanwhile: busy while results are due or one may come soon, then parked.

        Parking may be for ever: the end of the orchestrator ends this process (lifeline.py).
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


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
