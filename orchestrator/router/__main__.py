"""`python -m mgpu.orchestrator.router`: the router's process. Its spec and its orders come on standard input.

It is apart from the process that starts the copies, so that whatever clients send can end only the router: the next one
finds every request of a client with a session on the copies.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import time

import zmq

from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.gateway.front.transport.open_files import allow_many_connections
from mgpu.orchestrator.router.fleet import Fleet
from mgpu.orchestrator.router.router import Router
from mgpu.protocol.internal.process.child import BadSpec, end_with_parent, frame_spec, read_spec
from mgpu.protocol.internal.process.logs import configure_logging
from mgpu.protocol.internal.router_messages import ROUTER_LINK, RouterOrders, RouterReport, RouterSpec

MAX_REQUEST_BYTES = 1 << 20
KNOWN_S = 3.0
"""How long replicas may take to answer before clients are let in."""
REPORT_INTERVAL_S = 0.2

log = logging.getLogger(__name__)


def main() -> int:
    """Run until the parent says so, or is gone. 1 after a failure."""
    configure_logging("router")
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal group; the parent decides
    try:
        spec, orders = read_spec(ROUTER_LINK, RouterSpec), read_spec(ROUTER_LINK, RouterOrders)
    except BadSpec as error:
        sys.exit(f"router: {error}")
    end_with_parent(signal.SIGKILL)
    allow_many_connections()
    os.set_blocking(spec.report_fd, False)
    fleet = Fleet(spec.replica_keys or None)
    fleet.follow(orders)
    fleet.wait_until_known(KNOWN_S)
    with zmq.Context() as context:
        front = FrontSocket(context, spec.bind, MAX_REQUEST_BYTES, spec.keys, spec.own_key)
        if spec.limits is not None:
            front.connections.max_of_key = spec.limits.max_client_connections
        router = Router(front, fleet.replicas, names_accounts=not spec.replica_keys, limits=spec.limits)
        try:
            _serve(router, fleet, orders, front.endpoint, spec.report_fd)
        finally:
            fleet.close()
            front.close()
    return 0


def _serve(router: Router, fleet: Fleet, orders: RouterOrders, endpoint: str, report_fd: int) -> None:
    stdin, report_at_s = sys.stdin.fileno(), 0.0
    while orders.state != "stopped":
        router.questions.state, router.questions.own = orders.state, orders.counters
        ready = router.turn([stdin])
        if (now_s := time.monotonic()) >= report_at_s:
            report_at_s = now_s + REPORT_INTERVAL_S
            _report(router, fleet, endpoint, orders.number, report_fd)
        if stdin in ready:
            try:
                orders = read_spec(ROUTER_LINK, RouterOrders)
            except BadSpec:  # the parent is gone
                break
            fleet.follow(orders, router.dispatch)
    router.stop("the server has stopped")


def _report(router: Router, fleet: Fleet, endpoint: str, number: int, report_fd: int) -> None:
    model = next((each.health.model for each in fleet.replicas if each.health is not None), "")
    report = RouterReport(endpoint, model, len(router.table), fleet.reports(), number)
    with contextlib.suppress(OSError):  # the parent is slow, or gone
        os.write(report_fd, frame_spec(ROUTER_LINK.encode(report)))


if __name__ == "__main__":
    sys.exit(main())
