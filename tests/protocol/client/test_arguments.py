"""What programs pass to a client: numbers of other libraries, odd endpoints, and the client itself."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.servers.gateway_process import GatewayProcess
from mgpu import AsyncClient, Client, RequestFailed, ServerUnreachable
from mgpu.protocol.client.requests.request_message import generate_message, prompt_field


@pytest.mark.parametrize("ids", [
    np.array([1, 2]), torch.tensor([1, 2]), [np.int32(1), 2], (torch.tensor(1), np.uint8(2)), range(1, 3), iter([1, 2]),
])  # fmt: skip
def test_token_ids_may_be_those_of_numpy_and_torch(ids: object) -> None:
    assert prompt_field(ids) == prompt_field([1, 2])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "ids", [[True], [1.0], [None], ["1", 2], np.array([1.5]), torch.ones(2, 2), [np.True_]], ids=repr
)
def test_what_is_no_integer_is_no_token_id(ids: object) -> None:
    with pytest.raises(RequestFailed, match="prompt"):
        prompt_field(ids)  # type: ignore[arg-type]


def test_options_may_be_numbers_of_numpy() -> None:
    odd = {
        "seed": np.int64(3), "temperature": np.float32(0.5), "max_tokens": torch.tensor(4), "top_p": np.float64(0.5),
        "stop_token_ids": [np.int16(1), 2, np.int16(3)], "logit_bias": {np.int64(5): np.float32(1.0)},
    }  # fmt: skip
    plain = {
        "seed": 3, "temperature": 0.5, "max_tokens": 4, "top_p": 0.5,
        "stop_token_ids": [1, 2, 3], "logit_bias": {5: 1.0},
    }  # fmt: skip
    messages = [
        generate_message(1, {"prompt": "a"}, options, stream=True, timeout_s=seconds)  # type: ignore[arg-type]
        for options, seconds in ((odd, np.float64(5)), (plain, 5.0))
    ]
    assert messages[0] == messages[1]
    kinds = [type(value) for value in messages[0].values()]
    assert set(kinds) <= {int, float, str, bool, list}


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("endpoint", [Path("/run/x"), 0, b"ipc:///x"], ids=repr)
def test_an_endpoint_that_is_no_text_is_refused_in_words(kind: type, endpoint: object) -> None:
    with pytest.raises(ServerUnreachable, match="an endpoint is text, such as tcp://"):
        kind(endpoint)


def test_a_copy_is_a_client_of_its_own(gateway: GatewayProcess) -> None:
    with Client(gateway.endpoint, 7.0, retries=0) as client:
        with copy.copy(client) as other:
            assert other.generate([5], max_tokens=2).token_ids == (5, 5)
        assert client.generate([6], max_tokens=2).token_ids == (6, 6)
