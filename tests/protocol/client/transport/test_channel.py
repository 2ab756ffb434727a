"""The socket of a client: it keeps what its server has not read yet."""

from pathlib import Path

import zmq

from harness.waiting import eventually
from mgpu.protocol.client.transport.channel import Channel
from mgpu.protocol.front import framing

BURST = 3000
"""Messages: three times what libzmq takes for one peer by default."""


def test_a_burst_that_the_server_has_not_read_is_kept(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/front"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.setsockopt(zmq.RCVHWM, 1)
        server.setsockopt(zmq.RCVTIMEO, 20_000)
        server.bind(endpoint)
        channel = Channel(endpoint)
        try:
            eventually(lambda: channel.note(channel.read_events()) or channel.is_connected)
            for number in range(BURST):
                channel.send({"type": "cancel", "id": number, "more": "x" * 1000})  # beyond what the kernel takes
            for number in range(BURST):
                _, *frames = server.recv_multipart()
                assert framing.unpack(frames, framing.FROM_CLIENT)["id"] == number
        finally:
            channel.close()
