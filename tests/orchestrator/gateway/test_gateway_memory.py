"""A message without an end costs the gateway process, and nobody an answer."""

from pathlib import Path

import pytest

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess
from harness.servers.zmtp_flood import MiB, flood, hear, raw_connection
from mgpu import Client
from mgpu.orchestrator.gateway.memory_limit import MemoryFull, MemoryLimit, room_for
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import GatewayFailure


def test_a_message_without_an_end_ends_the_gateway_and_no_stream(model_folder: Path) -> None:
    with GatewayProcess(model_folder, memory_bytes=64 * MiB) as gateway, Client(gateway.endpoint) as client:
        stream = client.stream([1, 2, 3], max_tokens=50)
        tokens = [*next(stream).token_ids]
        gateway.engine.going.clear()
        flood(gateway.endpoint)
        failure = gateway.engine.messages.get(timeout=DEADLINE_S)
        assert isinstance(failure, GatewayFailure)
        assert failure.caused_by_clients
        assert "MiB more than at first, the bound is 64 MiB" in failure.message
        assert gateway.process.wait(DEADLINE_S) == 1
        gateway.kill()
        gateway.replace()
        gateway.engine.going.set()
        tokens += [token for piece in stream for token in piece.token_ids]
        assert tokens == ([1, 2, 3] * 17)[:50]


def test_a_raw_peer_that_keeps_to_the_bound_is_left_alone(model_folder: Path) -> None:
    """Or the flood might be refused for another reason than its size."""
    with GatewayProcess(model_folder, memory_bytes=64 * MiB) as gateway, raw_connection(gateway.endpoint) as peer:
        peer.sendall(b"\x01\x05mgpu1\x00\x01\x80")
        hear(peer, b"bad_request")
        assert gateway.process.poll() is None


def test_growth_counts_from_the_baseline() -> None:
    bound, limits = MemoryLimit(32 * MiB), ClientLimits()
    bound.check(limits)
    held = b"x" * (64 * MiB)
    with pytest.raises(MemoryFull, match="the bound is 32 MiB"):
        bound.check(limits)
    bound.set_baseline()
    bound.check(limits)
    assert len(held) == 64 * MiB


@pytest.mark.parametrize(("limits", "allowed"), [(ClientLimits(), 1792), (ClientLimits(max_queue=1 << 30), 3328)])
def test_the_bound_leaves_room_for_what_the_other_bounds_allow(limits: ClientLimits, allowed: int) -> None:
    assert room_for(limits) == allowed * MiB


def test_the_kernel_prefers_the_gateway_when_memory_runs_out(model_folder: Path) -> None:
    with GatewayProcess(model_folder, ready=False) as gateway:
        assert int(Path(f"/proc/{gateway.process.pid}/oom_score_adj").read_text()) >= 500


def test_memory_is_tight_from_a_quarter_of_the_bound_on() -> None:
    bound, limits = MemoryLimit(256 * MiB), ClientLimits()
    assert not bound.is_tight(limits)
    held = b"x" * (80 * MiB)
    assert bound.is_tight(limits)
    assert len(held) == 80 * MiB
    del held
    assert not bound.is_tight(limits)
