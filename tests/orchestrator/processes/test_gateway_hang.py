"""The gateway lives but does nothing: it is replaced as if it had died, and clients get the rest of their answers."""

import threading
from array import array
from pathlib import Path

import pytest

from harness.servers.fake_model import solo_tokens
from harness.servers.gateway_loss import REAL_GATEWAY, SESSION, endpoint_of, gateway_of, lose_the_gateway, resumable
from harness.servers.server_process import ServerProcess, ready_server, running_server
from mgpu import Client
from mgpu.protocol.internal.gateway_messages import RecordQuery

MANY = 1000
"""Restarts: on a loaded machine the short deadlines of these tests may be missed once more than meant."""


def stop_the_gateway(server: ServerProcess) -> None:
    """Let it hang, and wait until the next one is told that all is well."""
    known = len(server.infos)
    [gateway] = server.children_like("harness.servers.fake_gateway")
    gateway.suspend()
    server.wait_for(lambda: any(info.state == "ready" for info in server.infos[known:]))


def test_a_request_goes_on_while_a_gateway_that_hangs_is_replaced(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.01}, gateway_timeout_s=2.0, max_restarts=MANY) as server:
        server.send(resumable(1, [1, 2, 3], 200))
        server.wait_for(lambda: 1 in server.tokens)
        stop_the_gateway(server)
        assert "the gateway failed: it hangs: it did not answer for 2 s" in server.log
        server.send(RecordQuery(5, SESSION, 1))
        server.wait_for(lambda: bool(server.records))
        known = array("i", server.records[0].sequences[0].token_ids).tolist()
        server.tokens.clear()  # what came before the record is part of it
        if not server.records[0].sequences[0].finish:
            server.wait_for(lambda: 1 in server.finish)
        assert known + server.tokens.get(1, []) == solo_tokens([1, 2, 3], 200)
        assert server.counters()["gateway_restarts"] >= 1


def test_a_gateway_that_hangs_counts_as_a_failure(folder: Path) -> None:
    with ready_server(folder, gateway_timeout_s=2.0, max_restarts=0) as server:
        [gateway] = server.children_like("harness.servers.fake_gateway")
        gateway.suspend()
        assert server.wait_exit() == 1
        assert "giving up after 0 restarts within 600 s; the last cause: the gateway failed: it hangs" in server.log


def test_a_new_gateway_that_does_not_get_ready_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "stuck").touch()
    monkeypatch.setenv("FAKE_GATEWAY_STUCK", str(folder / "stuck"))
    with ready_server(folder, gateway_start_timeout_s=4.0, max_restarts=MANY) as server:
        lose_the_gateway(server)
        assert not (folder / "stuck").exists()
        assert "the gateway failed: it hangs: it was not ready for 4 s" in server.log
        assert server.counters()["gateway_restarts"] >= 2


def test_clients_of_a_gateway_that_hangs_resume_by_themselves(folder: Path) -> None:
    prompt, max_tokens = [5, 6, 7], 200
    options = {"step_s": 0.02, "num_blocks": [400, 400]}
    with running_server(
        folder, options, gateway_command=REAL_GATEWAY, gateway_timeout_s=3.0, max_restarts=MANY
    ) as server:
        tokens: list[int] = []
        begun = threading.Event()

        def read() -> None:
            with Client(endpoint_of(server, folder)) as client:
                for piece in client.stream(prompt, max_tokens=max_tokens, ignore_eos=True):
                    tokens.extend(piece.token_ids)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30)
        gateway_of(server).suspend()
        reader.join(60)
        assert not reader.is_alive(), server.log
        assert tokens == solo_tokens(prompt, max_tokens), server.log
        assert "it hangs: it did not answer for 3 s" in server.log
