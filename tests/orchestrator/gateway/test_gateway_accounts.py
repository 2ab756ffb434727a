"""A program that serves several clients names the account of each request."""

from pathlib import Path

from harness.gateway_process import GatewayProcess
from mgpu import Client
from mgpu.protocol.internal.client_limits import ClientLimits


def test_a_named_account_is_one_on_all_connections_and_has_its_weight(model_folder: Path) -> None:
    limits = ClientLimits(client_weights={"client:alice": 4.0})
    with GatewayProcess(model_folder, limits=limits) as gateway:
        for account in ("alice", "alice", "bob", ""):
            with Client(gateway.endpoint) as client:
                client.generate([1], max_tokens=1, account=account)
        accounts = [submit.account for submit in gateway.engine.submits]
        assert accounts[0] == accounts[1]
        assert len(set(accounts)) == 3
        assert [submit.weight for submit in gateway.engine.submits] == [4.0, 4.0, 1.0, 1.0]
