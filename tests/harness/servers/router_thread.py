"""A router in a thread of the test."""

import threading

import zmq

from harness.waiting import eventually
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.replica import Replica
from mgpu.orchestrator.router.router import Router
from mgpu.protocol.internal.client_limits import ClientLimits


class RouterThread:
    """A router that runs until `end`, which is like a death: nobody is told anything."""

    def __init__(
        self, endpoint: str, endpoints: list[str], names_accounts: bool = True, limits: ClientLimits | None = None
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = FrontSocket(self._context, endpoint, 1 << 20)
        self.replicas = [Replica(f"replica{at}") for at in range(len(endpoints))]
        self.router = Router(self._front, self.replicas, names_accounts, limits)
        self.endpoint = endpoint
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoints,), daemon=True)
        self._thread.start()

    def _run(self, endpoints: list[str]) -> None:
        for replica, endpoint in zip(self.replicas, endpoints, strict=True):
            replica.connect(endpoint)
        while not self._stopping.is_set():
            self.router.turn(wait_s=0.01)

    def wait_until_ready(self, count: int = 2) -> None:
        eventually(lambda: sum(each.takes_requests for each in self.replicas) == count, lambda: self.replicas)

    def end(self) -> None:
        self._stopping.set()
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        for replica in self.replicas:
            if replica.session is not None:
                replica.session.requests.clear()  # a dead process cancels nothing
                replica.session.channel.close()
        self._front.close()
        self._context.destroy(linger=0)
