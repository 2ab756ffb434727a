"""A target's server while it is asked."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mgpu.launch.bench.probe import Probe
from mgpu.launch.bench.target import READY_S, Target
from mgpu.launch.server_process import ServerDied, ServerProcess
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.client import Client
from mgpu.protocol.client.results import MgpuError

TIMEOUT_S = 900.0
"""Longest time that an answer may take."""
SILENCE_S = 60.0
"""Longest silence of a server that is under more load than its clients would put on it."""


@contextlib.contextmanager
def started(target: Target, **settings: Any) -> Iterator[ServerProcess]:
    """Give the target's server, which runs inside the block; see `Target.start`. UserError when it fails."""
    try:
        with target.start(**settings) as server:
            yield server
    except ServerDied as error:
        raise UserError(f"the server to measure failed: {error}") from error


@contextlib.contextmanager
def serving(target: Target) -> Iterator[str]:
    """Give the endpoint of the target's server, which runs inside the block. UserError when it fails, then or later."""
    try:
        with started(target) as server:
            yield server.wait_ready(READY_S)
    except MgpuError as error:
        raise UserError(f"the server to measure did not answer as it should: {error}") from error


@contextlib.contextmanager
def probing(target: Target) -> Iterator[Probe]:
    """Give a probe of the target's server, which runs inside the block. UserError as `serving`."""
    with serving(target) as endpoint, Client(endpoint, timeout_s=TIMEOUT_S, silence_timeout_s=SILENCE_S) as client:
        yield Probe(client, target.plan.facts.vocab_size)
