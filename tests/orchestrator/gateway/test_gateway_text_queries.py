"""Questions about text: what a prompt becomes, what it costs, and the text of token ids."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import BOS, EOS, START, GatewayProcess, make_model_folder
from harness.servers.raw_peer import RawPeer
from mgpu import Client, RequestFailed
from mgpu.orchestrator.gateway.requests.prompts import INLINE_CHARS, INLINE_IDS
from mgpu.orchestrator.gateway.text.text_queries import MAX_REPLY_BYTES
from mgpu.protocol.internal.client_limits import ClientLimits

HI = [{"role": "user", "content": "Hi"}]
ALL_TEXTS = ["", "h", "hé", "x" * INLINE_CHARS, "é" * INLINE_CHARS + "!"]


@pytest.mark.parametrize("text", ALL_TEXTS[1:])
def test_a_count_is_what_the_request_will_have(gateway: GatewayProcess, client: Client, text: str) -> None:
    gateway.set_info(max_seq_len=100_000, kv_tokens=100_000)
    assert client.count_tokens(text) == client.generate(text, max_tokens=1).usage.prompt_tokens
    gateway.set_info()


def test_a_count_of_a_chat_is_what_the_request_will_have(client: Client) -> None:
    assert client.count_tokens(HI) == client.chat(HI, max_tokens=1).usage.prompt_tokens


@pytest.mark.parametrize("text", ALL_TEXTS)
def test_text_becomes_token_ids_and_text_again(client: Client, text: str) -> None:
    ids = client.tokenize(text)
    assert ids == [BOS, *text.encode()]
    assert client.tokenize(text, add_special_tokens=False) == ids[1:]
    assert client.detokenize(ids) == "<s>" + text
    assert client.detokenize(ids, skip_special_tokens=True) == text


def test_a_chat_becomes_the_text_and_token_ids_of_its_template(client: Client) -> None:
    assert client.apply_chat_template(HI) == "<s><|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert client.tokenize(HI)[:3] == [BOS, START, ord("u")]
    assert client.detokenize(client.tokenize(HI)) == client.apply_chat_template(HI)


def test_the_engine_does_not_hear_of_it(gateway: GatewayProcess, client: Client) -> None:
    client.tokenize("a")
    client.apply_chat_template(HI)
    assert not gateway.engine.submits
    gateway.wait_until_idle()


def test_bytes_that_are_no_character_are_shown(client: Client) -> None:
    assert client.detokenize([*"x€".encode()[:-1], EOS], skip_special_tokens=True) == "x\ufffd"


@pytest.mark.parametrize("count", [1, INLINE_IDS + 1])
def test_an_unknown_token_id_is_refused_with_the_numbers(client: Client, count: int) -> None:
    with pytest.raises(RequestFailed, match="token id 300; the vocabulary has ids 0 to 299"):
        client.detokenize([300] * count)


def test_ids_of_the_vocabulary_without_a_piece_have_no_text(client: Client) -> None:
    assert client.detokenize([ord("a"), 299, ord("b")]) == "ab"


def test_a_reply_is_bounded_and_a_count_is_not(client: Client) -> None:
    text = "x" * (MAX_REPLY_BYTES // 4)
    assert client.count_tokens(text) == len(text) + 1
    with pytest.raises(RequestFailed, match=f"{len(text) + 1} token ids has {4 * len(text) + 4} bytes, the limit"):
        client.tokenize(text)
    assert len(client.tokenize(text, add_special_tokens=False)) == len(text)


def test_what_is_wrong_is_said(client: Client) -> None:
    with pytest.raises(RequestFailed, match="no tools here") as caught:
        client.apply_chat_template([{"role": "tool", "content": "x"}])
    assert caught.value.code == "bad_request"
    with pytest.raises(RequestFailed, match="template_options only applies to messages"):
        client.count_tokens("x", template_options={"thinking": True})
    with pytest.raises(RequestFailed, match=r"messages\[0\] lacks content"):
        client.count_tokens([{"role": "user"}])


def test_other_clients_are_told_what_is_wrong_by_the_gateway(gateway: GatewayProcess) -> None:
    peer = RawPeer(gateway.endpoint)
    for at, fields in enumerate((
        {"type": "tokenize"}, {"type": "tokenize", "prompt": "x", "messages": HI}, {"type": "detokenize"},
        {"type": "tokenize", "prompt": "x", "returns": "text"}, {"type": "tokenize", "prompt": "x", "returns": "ids"},
        {"type": "tokenize", "prompt": "x", "model": "other"}, {"type": "detokenize", "token_ids": []},
    )):  # fmt: skip
        peer.say(id=at, **fields)
        refused = peer.hear_answer()
        assert (refused["type"], refused["id"]) == ("failed", at)
        assert refused["code"] in ("bad_request", "unknown_model")
    peer.close()


@pytest.fixture
def small_gateway(model_folder: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(model_folder, limits=ClientLimits(max_client_requests=1)) as gateway:
        yield gateway


def test_a_question_counts_to_the_limits_of_its_client_until_it_is_answered(small_gateway: GatewayProcess) -> None:
    peer = RawPeer(small_gateway.endpoint)
    peer.say(type="tokenize", id=1, messages=HI)  # a thread starts the process for templates
    peer.say(type="tokenize", id=2, prompt="x")
    peer.say(type="tokenize", id=1, prompt="x")
    heard = [peer.hear_answer() for _ in range(3)]
    assert [(each["type"], each.get("code")) for each in heard] == [
        ("failed", "overloaded"), ("failed", "duplicate_id"), ("tokenized", None)
    ]  # fmt: skip
    peer.say(type="tokenize", id=2, prompt="x")
    assert peer.hear_answer()["num_tokens"] == 2
    peer.close()


@pytest.mark.parametrize(("fields", "end"), [({"timeout_s": 0.001}, "failed"), ({}, "finished")])
def test_a_question_ends_with_its_time_or_a_cancel(
    small_gateway: GatewayProcess, fields: dict[str, float], end: str
) -> None:
    peer = RawPeer(small_gateway.endpoint)
    peer.say(type="tokenize", id=1, messages=[{"role": "user", "content": "x" * 500_000}], **fields)
    if not fields:
        peer.say(type="cancel", id=1)
    assert peer.hear_answer()["type"] == end
    peer.say(type="tokenize", id=2, prompt="x")
    assert peer.hear_answer()["id"] == 2
    small_gateway.wait_until_idle()
    peer.close()


def test_a_model_without_a_tokenizer_or_template_says_so(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway, Client(gateway.endpoint) as client:
        for ask in (lambda: client.tokenize("x"), lambda: client.detokenize([1]), lambda: client.count_tokens(HI)):
            with pytest.raises(RequestFailed, match="has no tokenizer"):
                ask()
    make_model_folder(tmp_path, template=None)
    with GatewayProcess(tmp_path) as gateway, Client(gateway.endpoint) as client:
        assert client.count_tokens("x") == 2
        with pytest.raises(RequestFailed, match="no chat template"):
            client.apply_chat_template(HI)
