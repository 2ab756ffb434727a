"""What wakes the engine up and how long it may sleep: on GPUs, waking up costs more than a short step can spare."""

import math

import zmq

from mgpu.orchestrator.host.signals import Signals
from mgpu.orchestrator.processes.gateway_process import GatewayProcess
from mgpu.orchestrator.processes.group import Group
from mgpu.orchestrator.processes.http_process import HttpProcess


def poller_of(signals: Signals, gateway: GatewayProcess, http: HttpProcess, workers: Group) -> zmq.Poller:
    """Watch signals, messages and the ends of processes; make another one when a process has been replaced."""
    poller = zmq.Poller()
    processes = (*gateway.processes, *workers.processes)
    for source in (signals.fd, gateway.socket, *workers.sockets, *http.fds, *(process.pidfd for process in processes)):
        poller.register(source, zmq.POLLIN)
    return poller


class SpinPolicy:
    """Decides when to look again at once instead of sleeping. Times are CLOCK_MONOTONIC.

    A result is due at 15.000 s and the engine may spin for 2 ms: it sleeps until 14.999 s, then looks without a pause
    until 15.001 s, then sleeps until the result wakes it up. So a result that comes on time costs no wake-up, and one
    that is late does not keep a core busy.
    """

    def __init__(self, spin_s: float) -> None:
        """``spin_s`` is how long to look without a pause before sleeping after all; 0: never look so."""
        self._spin_s = spin_s
        self._awake_until_s = 0.0

    def stay_awake(self, now_s: float) -> bool:
        """Spin for a moment, since work is about to come. Return False where nothing spins."""
        self._awake_until_s = now_s + self._spin_s
        return self._spin_s > 0

    def sleep_s(self, now_s: float, due_s: float | None) -> float:
        """Return how long to sleep at the most; 0 while it is better to look again at once.

        ``due_s`` is when the next result is expected, None when no step is in flight.
        """
        if not self._spin_s:
            return math.inf
        if due_s is None:
            return 0.0 if now_s < self._awake_until_s else math.inf
        opens_s, closes_s = due_s - self._spin_s / 2, due_s + self._spin_s / 2
        if now_s < opens_s:
            return opens_s - now_s
        return 0.0 if now_s < closes_s else math.inf
