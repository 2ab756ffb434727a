"""The socket of a client: it keeps what its server has not read yet."""

from itertools import count, islice
from pathlib import Path

import pytest
import zmq

from harness.waiting import eventually
from mgpu.protocol.client.transport.channel import Channel
from mgpu.protocol.errors import RequestFailed
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


def test_messages_that_are_bundled_leave_together_and_in_order(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/front"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.setsockopt(zmq.RCVTIMEO, 20_000)
        server.bind(endpoint)
        channel = Channel(endpoint)
        channel.bundle(3)
        numbers = count()

        def send(how_many: int) -> None:
            for number in islice(numbers, how_many):
                channel.send({"type": "cancel", "id": number})

        def heard(how_many: int) -> list[object]:
            return [framing.unpack(server.recv_multipart()[1:])["id"] for _ in range(how_many)]

        send(2)
        assert not server.poll(50), "they wait for a third, or for the end of the turn"
        send(1)
        assert heard(3) == [0, 1, 2]
        send(2)
        channel.flush()
        assert heard(2) == [3, 4]
        send(1)
        channel.close()
        assert heard(1) == [5], "what was kept is sent before the socket closes"


@pytest.mark.parametrize(("value", "words"), [
    ({str(number): 1 for number in range(1_025)}, "1025 exceeds"),
    ([0] * 65_537, "65537 exceeds"),
    ([[]] * 8_200, "more than 8192 arrays and maps"),
    ("x" * (1 << 20), "the limit is 1048576"),
])  # fmt: skip
def test_what_the_server_could_not_decode_is_not_sent(tmp_path: Path, value: object, words: str) -> None:
    """The answer would have no id, and end all requests of the connection."""
    channel = Channel(f"ipc://{tmp_path}/front")
    try:
        with pytest.raises(RequestFailed, match=words):
            channel.send({"type": "generate", "id": 1, "value": value})
    finally:
        channel.close()
