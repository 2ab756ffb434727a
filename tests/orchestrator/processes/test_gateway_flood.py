"""Somebody fills the gateway's memory again and again: it is replaced each time, and the server goes on."""

import contextlib
import os
import threading
from pathlib import Path

from harness.servers.fake_model import solo_tokens
from harness.servers.gateway_loss import REAL_GATEWAY, endpoint_of
from harness.servers.server_process import DEADLINE_S, ServerProcess, running_server
from harness.servers.zmtp_flood import MiB, flood
from harness.waiting import eventually
from mgpu import Client

NUM_FLOODS = 3


def flood_until(endpoint: str, server: ServerProcess, times: int) -> None:
    """Fill the gateway of the moment until it was too much for it so often."""

    def is_enough() -> bool:
        assert server.process.poll() is None, server.log
        with contextlib.suppress(OSError):  # between two gateways nobody listens
            flood(endpoint)
        return server.log.count("MiB more than at first") >= times

    eventually(is_enough, lambda: server.log, 2 * DEADLINE_S)


def test_floods_end_neither_the_server_nor_a_stream(folder: Path) -> None:
    """Although not one failure of the gateway is allowed."""
    prompt, max_tokens = [5, 6, 7], 200
    options = {"step_s": 0.03, "num_blocks": [400]}
    with running_server(
        folder, options, gateway_command=REAL_GATEWAY, gateway_memory_bytes=64 * MiB, max_restarts=0
    ) as server:
        endpoint = endpoint_of(server, folder)
        tokens: list[int] = []
        begun = threading.Event()

        def read() -> None:
            with Client(endpoint) as client:
                for piece in client.stream(prompt, max_tokens=max_tokens, ignore_eos=True):
                    tokens.extend(piece.token_ids)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(DEADLINE_S)
        flood_until(endpoint, server, NUM_FLOODS)
        reader.join(60)
        assert not reader.is_alive(), server.log
        assert tokens == solo_tokens(prompt, max_tokens), server.log
        with Client(endpoint) as client:
            assert client.stats()["gateway_restarts"] >= NUM_FLOODS, server.log
        assert f"the gateway has died of input of pid:{os.getpid()}, shut out for 2 s" in server.log


def test_a_flood_while_the_model_loads_does_not_end_the_start(folder: Path) -> None:
    endpoint = f"ipc://{folder}/front"
    options = {"load_s": 4.0}
    with running_server(
        folder, options, bind=endpoint, gateway_command=REAL_GATEWAY, gateway_memory_bytes=64 * MiB, max_restarts=0
    ) as server:
        flood_until(endpoint, server, 1)
        endpoint_of(server, folder)
        with Client(endpoint) as client:
            answer = client.generate([5, 6, 7], max_tokens=10, ignore_eos=True)
        assert list(answer.token_ids) == solo_tokens([5, 6, 7], 10)
