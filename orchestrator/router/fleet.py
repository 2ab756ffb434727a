"""The replicas as the parent orders them."""

import time

from mgpu.orchestrator.router.dispatch import Dispatch
from mgpu.orchestrator.router.replica import Replica
from mgpu.protocol.internal.router_messages import ReplicaReport, RouterOrders

PAUSE_S = 0.005


class Fleet:
    """Replicas by name. ``replicas`` is the list that the router works with."""

    def __init__(self, keys: str | None = None) -> None:
        self.replicas: list[Replica] = []
        self._keys = keys
        self._endpoints: dict[str, str] = {}

    def follow(self, orders: RouterOrders, dispatch: Dispatch | None = None) -> None:
        """Connect to what is there, and leave what is not; ``dispatch`` is None before there are any requests."""
        ordered = {order.name for order in orders.replicas}
        for gone in [each for each in self.replicas if each.name not in ordered]:
            self._remove(gone, dispatch)
        known = {replica.name: replica for replica in self.replicas}
        for order in orders.replicas:
            replica = known.get(order.name)
            if replica is None:
                replica = Replica(order.name, self._keys)
                self.replicas.append(replica)
            replica.is_held = order.is_held
            if self._endpoints.get(order.name, "") == order.endpoint:
                continue
            self._endpoints[order.name] = order.endpoint
            if dispatch is not None:
                dispatch.leave(replica, "it is not there")
            if order.endpoint:
                replica.connect(order.endpoint)
            else:
                replica.disconnect()

    def _remove(self, replica: Replica, dispatch: Dispatch | None) -> None:
        if dispatch is not None:
            dispatch.leave(replica, "it is named no longer")
        replica.disconnect()
        self.replicas.remove(replica)
        del self._endpoints[replica.name]

    def wait_until_known(self, seconds: float) -> None:
        """Wait, so long at most, until every replica that is there has said whether it takes requests.

        Clients of a router that was lost come back as soon as the next one listens. What they then send for the first
        time would be refused, if no replica were known to take it.
        """
        until_s = time.monotonic() + seconds
        while (now_s := time.monotonic()) < until_s:
            for replica in self.replicas:
                replica.receive()
                replica.ask(now_s)
                replica.send()
            if all(replica.is_known or replica.session is None for replica in self.replicas):
                return
            time.sleep(PAUSE_S)

    def reports(self) -> list[ReplicaReport]:
        """Return what the parent is told."""
        return [ReplicaReport(each.name, each.state, len(each.parts), each.problem) for each in self.replicas]

    def close(self) -> None:
        for replica in self.replicas:
            replica.disconnect()
