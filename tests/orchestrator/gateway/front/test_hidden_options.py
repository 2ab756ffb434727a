"""Clients that mix PINGs with their messages and leave, or choose routing ids: libzmq alone would not stand that."""

import contextlib
import itertools
import logging
import time
from pathlib import Path

import msgpack
import psutil
import pytest
import zmq

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess, assert_serves
from harness.servers.zmtp_flood import hear, raw_connection
from harness.waiting import eventually
from mgpu.orchestrator.gateway.front import hidden_options
from mgpu.orchestrator.gateway.front.hidden_options import set_hidden_options
from mgpu.protocol.front.framing import VERSION
from mgpu.protocol.internal.gateway_messages import ServerKeys
from mgpu.protocol.keys import ClientKeys, new_pair, use_client_keys

BODY: bytes = msgpack.packb({"type": "health", "id": 1})
MESSAGE = bytes([1, len(VERSION)]) + VERSION + bytes([0, len(BODY)]) + BODY
PINGS = {"short": b"\x04\x05\x04PING", "plain": b"\x04\x07\x04PING\0\0", "long": b"\x04\x17\x04PING\0\0" + bytes(16)}


@pytest.mark.parametrize("ping", PINGS.values(), ids=list(PINGS))
def test_pings_of_a_client_that_leaves_do_not_end_the_gateway(gateway: GatewayProcess, ping: bytes) -> None:
    for _ in range(8):
        with raw_connection(gateway.endpoint) as peer:
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                peer.send((MESSAGE + ping) * 400)
    assert_serves(gateway.endpoint)


def test_heartbeats_of_a_client_with_keys_that_leaves_do_not_end_the_gateway(model_folder: Path) -> None:
    (server, server_secret), (public, secret) = new_pair(), new_pair()
    keys = ServerKeys(server_secret, [public])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with GatewayProcess(model_folder, bind="tcp://127.0.0.1:0", keys=keys, ready=False) as gateway:

        def connect() -> "zmq.Socket[bytes]":
            peer = context.socket(zmq.DEALER)
            peer.setsockopt(zmq.LINGER, 0)
            peer.setsockopt(zmq.RCVHWM, 1)
            peer.setsockopt(zmq.SNDHWM, 0)
            peer.setsockopt(zmq.HEARTBEAT_IVL, 1)
            peer.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
            use_client_keys(peer, ClientKeys(secret, public, server))
            peer.connect(gateway.endpoint)
            return peer

        for _ in range(8):
            peer = connect()
            peer.send_multipart([VERSION, BODY])
            assert peer.poll(int(DEADLINE_S * 1000))
            end_s = time.monotonic() + 0.2
            while time.monotonic() < end_s:
                peer.send_multipart([VERSION, BODY])
            peer.close()
        peer = connect()
        peer.send_multipart([VERSION, BODY])
        assert peer.poll(int(DEADLINE_S * 1000))
        assert gateway.process.poll() is None
    context.destroy(0)


def test_a_routing_id_is_not_chosen_by_a_peer_whatever_it_asks_for(gateway: GatewayProcess) -> None:
    """An id in use would keep all that is sent under it, and its descriptor; a long one would cost time."""
    gateway_process = psutil.Process(gateway.process.pid)
    with raw_connection(gateway.endpoint, b"taken") as holder:
        holder.sendall(MESSAGE)
        hear(holder, b"running")
        before = gateway_process.num_fds()
        for _ in range(20):
            with raw_connection(gateway.endpoint, b"taken") as peer:
                peer.sendall(MESSAGE * 200)
        with raw_connection(gateway.endpoint, b"taken") as peer:
            peer.sendall(MESSAGE)
            hear(peer, b"running")
        with raw_connection(gateway.endpoint, bytes(1_000_000)) as peer:
            peer.sendall(MESSAGE)
            hear(peer, b"running")
        eventually(lambda: gateway_process.num_fds() <= before)
    assert_serves(gateway.endpoint)


def test_large_and_small_messages_arrive_whole_in_any_pieces(tmp_path: Path) -> None:
    """The frames that lie just below, at and above the lengths at which ZMTP and libzmq change their ways."""
    sizes = [0, 1, 2, 3, 7, 8, 9, 32, 33, 34, 255, 256, 257, 8191, 8192, 8193, 1 << 20]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    assert set_hidden_options(context, router)
    router.bind(f"ipc://{tmp_path}/front")
    dealer.connect(f"ipc://{tmp_path}/front")
    sent = [
        [bytes([at]) * first, bytes([at]) * second]
        for at, (first, second) in enumerate(itertools.product(sizes, sizes[:8]))
    ]
    for frames in sent:
        dealer.send_multipart(frames)
        assert router.poll(int(DEADLINE_S * 1000))
        assert router.recv_multipart()[1:] == frames
    context.destroy(0)


def test_another_libzmq_is_left_alone_and_said_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hidden_options.zmq, "zmq_version_info", lambda: (4, 4, 0))
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, caplog.at_level(logging.WARNING):
        assert not set_hidden_options(context, router)
    assert "are not found" in caplog.text
