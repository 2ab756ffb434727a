"""Too much of everything: who asks for more is told when to come back, and nobody else notices."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer
from harness.waiting import eventually
from mgpu import Client
from mgpu.orchestrator.gateway.requests.quota import MAX_QUESTIONS_OF_ACCOUNT, MAX_RETRY_S, MIN_RETRY_S
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import Reload

LIMITS = ClientLimits(max_client_requests=5, max_sequences=8, max_client_queue=40_000)


@pytest.fixture(scope="module")
def small_gateway(model_folder: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(model_folder, limits=LIMITS) as gateway:
        yield gateway


@pytest.fixture
def gateway(small_gateway: GatewayProcess) -> Iterator[GatewayProcess]:
    """A gateway with small limits; whatever the test did to it, the next request is served."""
    gateway = small_gateway
    gateway.engine.reset()
    yield gateway
    gateway.engine.tell(Reload(None, LIMITS))
    gateway.engine.reset()
    gateway.set_info()
    gateway.wait_until_idle()
    assert_serves(gateway.endpoint)


@pytest.fixture
def peers(gateway: GatewayProcess) -> Iterator[list[RawPeer]]:
    peers = [RawPeer(gateway.endpoint) for _ in range(3)]
    yield peers
    for peer in peers:
        peer.close()


def answers(peer: RawPeer, count: int) -> list[str]:
    """Return the codes of failures, and ``accepted`` for what was taken."""
    return sorted(str(message.get("code", message["type"])) for message in (peer.hear() for _ in range(count)))


def test_a_full_server_says_so_to_everybody_and_serves_again_when_there_is_room(
    gateway: GatewayProcess, peers: list[RawPeer]
) -> None:
    gateway.engine.going.clear()
    for peer in peers[:2]:
        for request_id in range(4):
            peer.say(type="generate", id=request_id, prompt_ids=[5], max_tokens=1)
        assert answers(peer, 4) == ["accepted"] * 4
    peers[2].say(type="generate", id=1, prompt_ids=[5], max_tokens=1)
    [failed] = peers[2].hear_all(1)
    assert failed["code"] == "overloaded"
    assert "8 sequences in flight, the limit is 8" in failed["message"]
    assert MIN_RETRY_S <= failed["retry_after_s"] <= MAX_RETRY_S
    gateway.engine.going.set()
    for peer in peers[:2]:
        for request_id in range(4):
            assert peer.hear_all(request_id)[-1]["type"] == "finished"
    peers[2].say(type="generate", id=1, prompt_ids=[5], max_tokens=1)
    assert peers[2].hear_all(1)[-1]["type"] == "finished"


def test_a_client_at_its_limit_leaves_room_for_others(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    gateway.engine.going.clear()
    for request_id in range(20):
        peers[0].say(type="generate", id=request_id, prompt_ids=[5], max_tokens=1)
    assert answers(peers[0], 20) == ["accepted"] * 5 + ["overloaded"] * 15
    peers[1].say(type="generate", id=1, prompt_ids=[5], max_tokens=1)
    assert answers(peers[1], 1) == ["accepted"]
    gateway.engine.going.set()


def test_long_prompts_that_wait_are_bounded_by_their_bytes(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    gateway.set_info(max_seq_len=100_000, kv_tokens=100_000)
    gateway.engine.going.clear()
    for request_id in range(3):
        peers[0].say(type="generate", id=request_id, prompt_ids=b"\5\0\0\0" * 4000, max_tokens=1)
    failed = [message for message in (peers[0].hear() for _ in range(3)) if message["type"] == "failed"]
    assert [message["code"] for message in failed] == ["overloaded"]
    assert "the limit of 40000" in failed[0]["message"]
    gateway.engine.going.set()


def test_the_scheduler_is_told_whose_a_sequence_is_and_its_share(gateway: GatewayProcess) -> None:
    gateway.engine.tell(Reload(None, ClientLimits(client_weights={f"uid:{os.getuid()}": 4.0})))
    gateway.set_info(kv_tokens=8192)  # another value than before: once clients see it, the reload has been read too
    with Client(gateway.endpoint) as one, Client(gateway.endpoint) as other:
        one.generate([5], max_tokens=1, n=2)
        one.generate([6], max_tokens=1)
        other.generate([7], max_tokens=1)
    paths = [submit.account for submit in gateway.engine.submits]
    assert paths[0] == paths[1] == paths[2] != paths[3]
    assert paths[2][0] == paths[3][0], "both connections are of this process"
    assert all(submit.weights == [4.0, 1.0] for submit in gateway.engine.submits)


def test_the_engine_knows_who_floods_as_long_as_that_goes_on(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    peers[0].say(type="generate", id=1, prompt_ids=[5], max_tokens=1)
    gateway.engine.wait(lambda: bool(gateway.engine.submits))
    [owner] = {submit.account[0] for submit in gateway.engine.submits}

    def floods() -> bool:
        for number in range(500):
            peers[1].say(type="cancel", id=number)
        return gateway.engine.floods == [owner]

    eventually(floods)
    gateway.engine.wait(lambda: not gateway.engine.floods)


def test_new_limits_hold_without_a_restart(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    gateway.engine.tell(Reload(None, ClientLimits(max_client_requests=1)))
    gateway.set_info()
    gateway.engine.going.clear()
    for request_id in range(3):
        peers[0].say(type="generate", id=request_id, prompt_ids=[5], max_tokens=1)
    assert answers(peers[0], 3) == ["accepted", "overloaded", "overloaded"]
    gateway.engine.going.set()


def test_questions_that_wait_for_a_silent_engine_are_bounded(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    gateway.engine.answers_stats = False
    for request_id in range(MAX_QUESTIONS_OF_ACCOUNT + 10):
        peers[0].say(type="stats", id=request_id)
    codes = answers(peers[0], MAX_QUESTIONS_OF_ACCOUNT + 10)
    assert codes.count("overloaded") >= 1
    assert set(codes) == {"overloaded", "not_ready"}


def test_a_reader_that_does_not_read_does_not_slow_the_streams_of_others(model_folder: Path) -> None:
    """It is cut off in the end; meanwhile and afterwards the others get every token as its own message."""
    with GatewayProcess(model_folder) as gateway, contextlib.ExitStack() as stack:
        gateway.set_info(max_seq_len=10**6, kv_tokens=10**6)
        slow = stack.enter_context(contextlib.closing(RawPeer(gateway.endpoint)))
        slow.socket.setsockopt(zmq.RCVHWM, 1)
        for request_id in range(32):
            slow.say(type="generate", id=request_id, prompt_ids=[5], max_tokens=10**5, stream=True, logprobs=20)
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 32)
        counts: dict[int, int] = {}

        def stream(token: int) -> None:
            with Client(gateway.endpoint) as client:
                counts[token] = sum(len(piece.token_ids) for piece in client.stream([token], max_tokens=300))

        readers = [threading.Thread(target=stream, args=(token,)) for token in (7, 8, 9)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(DEADLINE_S)
        assert counts == {7: 300, 8: 300, 9: 300}
        gateway.engine.wait(lambda: len(gateway.engine.cancels) == 32)


def test_a_flood_of_resume_holds_nobody_up(gateway: GatewayProcess, peers: list[RawPeer]) -> None:
    session, n, max_tokens = "0123456789abcdef", 8, 400
    gateway.engine.portion = 100
    peer = peers[0]
    peer.say(type="generate", id=1, prompt_ids=[7], n=n, max_tokens=max_tokens, logprobs=20, session=session)
    peer.hear_all(1)
    asked = gateway.engine.portions
    for _ in range(500):
        peer.say(type="resume", id=1, session=session, offsets=[0] * n)
    with Client(gateway.endpoint) as client:
        assert client.health().state == "ready"
        assert client.generate([5], max_tokens=2).token_ids == (5, 5)
    messages = peer.hear_all(1)  # each resume makes the answer begin anew
    rest = messages[max(at for at, message in enumerate(messages) if message["type"] == "resumed") :]
    assert sum(len(message["token_ids"]) for message in rest if message["type"] == "tokens") == n * max_tokens
    assert gateway.engine.portions - asked < 200
