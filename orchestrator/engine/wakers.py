"""Everything that can wake the orchestrator up, as one poller."""

import zmq

from mgpu.orchestrator.host.signals import StopSignals
from mgpu.orchestrator.processes.gateway_process import GatewayLink
from mgpu.orchestrator.processes.worker_group import WorkerGroup


def poller_of(signals: StopSignals, gateway: GatewayLink, workers: WorkerGroup) -> zmq.Poller:
    """Watch signals, messages and the ends of processes; make another one when a process has been replaced."""
    poller = zmq.Poller()
    processes = (gateway.process, *workers.processes)
    for source in (signals.fd, gateway.socket, *workers.sockets, *(process.pidfd for process in processes)):
        poller.register(source, zmq.POLLIN)
    return poller
