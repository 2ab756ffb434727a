"""What a client gets for what it asks, from a real gateway process with a scripted engine."""

import pytest
from gateway_process import BOS, EOS, GatewayProcess, says

from mgpu import Client, RequestFailed
from mgpu.protocol.schema import int32_array


def test_ids_are_continued_and_come_back_as_text(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client:
        done = client.generate(list(b"abc"), max_tokens=5)
    assert (done.text, done.token_ids, done.finish_reason) == ("abcab", tuple(b"abcab"), "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.cached_tokens) == (3, 5, 3)


def test_text_is_tokenized_with_the_models_bos(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint) as client:
        client.generate("hé", max_tokens=1)
    assert list(int32_array(gateway.engine.submits[0].token_ids)) == [BOS, *"hé".encode()]
