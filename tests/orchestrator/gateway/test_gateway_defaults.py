"""What the gateway takes from a request, or else from elsewhere: its account, and how it is sampled."""

from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess
from mgpu import Client, RequestFailed
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.model.sampling import SamplingDefaults


def test_a_named_account_is_one_on_all_connections_and_has_its_weight(model_folder: Path) -> None:
    limits = ClientLimits(client_weights={"client:alice": 4.0})
    with GatewayProcess(model_folder, limits=limits) as gateway:
        for account in ("alice", "alice", "bob", ""):
            with Client(gateway.endpoint) as client:
                client.generate([1], max_tokens=1, account=account)
        owners, accounts = zip(*((each.account[0], each.account[1:]) for each in gateway.engine.submits), strict=True)
        assert len(set(owners)) == 1, "names are parts of the share of the process that sends them"
        assert accounts[0] == accounts[1]
        assert len(set(map(tuple, accounts))) == 3
        weights = [submit.weights for submit in gateway.engine.submits]
        assert weights == [[1.0, 4.0, 4.0], [1.0, 4.0, 4.0], [1.0, 1.0, 1.0], [1.0, 1.0]]


def test_the_models_sampling_is_for_requests_that_do_not_say(model_folder: Path) -> None:
    sampling = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95)
    with GatewayProcess(model_folder, sampling=sampling) as gateway, Client(gateway.endpoint) as client:
        client.generate([1], max_tokens=1)
        client.generate([1], max_tokens=1, temperature=0, top_k=3)
        with pytest.raises(RequestFailed, match="temperature must be"):
            client.generate([1], max_tokens=1, temperature=-1)
        silent, saying = (submit.sampling for submit in gateway.engine.submits)
    assert (silent.temperature, silent.top_k, silent.top_p) == (0.6, 20, 0.95)
    assert (saying.temperature, saying.top_k, saying.top_p) == (0.0, 3, 0.95)
