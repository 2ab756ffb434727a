"""Cancellations of requests that are being resumed, as any client would send them."""

from collections.abc import Iterator

import pytest

from harness.servers.gateway_process import GatewayProcess
from harness.servers.raw_peer import RawPeer

SESSION = "5f1d7c0b2a94e683"
ENDINGS = ("finished", "failed")


@pytest.fixture
def peers(gateway: GatewayProcess) -> Iterator[tuple[RawPeer, RawPeer]]:
    """One peer whose request of two choices has begun, and one that may resume it."""
    one, other = RawPeer(gateway.endpoint), RawPeer(gateway.endpoint)
    one.say(type="generate", id=1, session=SESSION, prompt_ids=[1, 2, 3], n=2, max_tokens=200, stream=True)
    one.hear_until("tokens")
    yield one, other
    one.close()
    other.close()


@pytest.mark.parametrize("offsets", [[-1, 0], [0, 0], [-1, -1], [1, -1]])
def test_a_cancel_between_two_portions_ends_no_choice_twice(
    gateway: GatewayProcess, peers: tuple[RawPeer, RawPeer], offsets: list[int]
) -> None:
    _, peer = peers
    gateway.engine.portion = 0  # there is always one more to come
    peer.say(type="resume", id=1, session=SESSION, offsets=offsets)
    assert [peer.hear()["type"] for _ in range(2)] == ["resumed", "accepted"]
    peer.say(type="cancel", id=1)
    heard = peer.hear_all(1)
    ended = [message["index"] for message in heard if message.get("finish_reason")]
    assert ended == [index for index, offset in enumerate(offsets) if offset >= 0]
    assert [message["type"] for message in heard if message["type"] in ENDINGS] == ["finished"]
    assert not peer.socket.poll(50)


def test_a_cancel_before_the_first_portion_is_not_lost(gateway: GatewayProcess, peers: tuple[RawPeer, RawPeer]) -> None:
    _, peer = peers
    peer.say(type="resume", id=1, session=SESSION, offsets=[0, 0])
    peer.say(type="cancel", id=1)
    heard = peer.hear_all(1)
    assert [message["index"] for message in heard if message.get("finish_reason")] == [0, 1]
    assert heard[-1]["finish_reasons"] == ["cancelled", "cancelled"]
    gateway.engine.wait(lambda: len(gateway.engine.cancels) == 2)
