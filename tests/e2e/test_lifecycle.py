"""Start, stop and sudden deaths of servers: true exit statuses, the cause on the screen, nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from harness.waiting import eventually
from mgpu import Client
from mgpu.launch.server_process import ServerDied, ServerProcess
from mgpu.protocol.errors import MgpuError, RequestFailed

LEFT_BEHIND_S = 20.0
END_S = 30.0


def start(model: str, *arguments: str) -> ServerProcess:
    return ServerProcess("-m", model, "--device", "cpu", *arguments)


def family_of(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def workers_of(server: ServerProcess) -> list[psutil.Process]:
    return [child for child in family_of(server) if child.cmdline()[-1] == "mgpu.worker"]


def is_alive(process: psutil.Process) -> bool:
    """A zombie is gone too: it waits for whoever adopted it, and holds nothing."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_files(process: psutil.Process) -> list[str]:
    """Return the files in /dev/shm that a process has mapped or opened. Shared memory without a name is no file."""
    mapped = [each.path for each in process.memory_maps(grouped=True)]
    return [path for path in (*mapped, *(each.path for each in process.open_files())) if path.startswith("/dev/shm/")]


def assert_nothing_left(server: ServerProcess, family: list[psutil.Process], timeout_s: float = LEFT_BEHIND_S) -> None:
    eventually(lambda: not any(map(is_alive, family)), lambda: family, timeout_s)
    left = lambda: [path for path in server.runtime_base.rglob("*") if path.name != "log"]  # noqa: E731
    eventually(lambda: not left(), left, timeout_s)


def test_sigterm_finishes_the_running_request_and_refuses_new_ones(text_model: str) -> None:
    with start(text_model) as server, Client(server.wait_ready()) as client:
        family = family_of(server)
        stream = client.stream("The first ten prime numbers are", max_tokens=800, ignore_eos=True)
        first = next(stream)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: client.health().state == "draining", client.health, 5.0)
        with pytest.raises(RequestFailed) as refused:
            client.generate("too late", max_tokens=1)
        assert refused.value.code == "draining"
        pieces = [first, *stream]
        assert sum(len(piece.token_ids) for piece in pieces) == 800
        assert pieces[-1].finish_reason == "length"
        assert server.process.wait(END_S) in (0, -signal.SIGTERM)
        assert_nothing_left(server, family)


def test_a_second_sigint_stops_at_once(text_model: str) -> None:
    with start(text_model) as server, Client(server.wait_ready()) as client:
        family = family_of(server)
        stream = client.stream("Tell me a long story.", max_tokens=30_000, ignore_eos=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: "stopping" in server.output(), server.output, 5.0)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(MgpuError):
            list(stream)
        assert server.process.wait(END_S) == -signal.SIGINT
        assert_nothing_left(server, family)


def test_sigkill_of_the_parent_leaves_nothing(text_model: str) -> None:
    with start(text_model, "--workers", "2") as server, Client(server.wait_ready()) as client:
        family = family_of(server)
        assert 3 <= len(family) <= 4  # two workers, the gateway, and soon its process for text
        assert [path for process in family for path in shared_files(process)] == []  # nobody would remove them
        of_driver = [Path(f"/dev/shm/cuda.shm.{os.geteuid()}.{each.pid:x}.1") for each in workers_of(server)]
        for file in of_driver:  # as NVIDIA's driver leaves them
            file.touch()
        stream = client.stream("Tell me a long story.", max_tokens=30_000, ignore_eos=True)
        next(stream)
        server.process.kill()
        server.process.wait(END_S)
        assert_nothing_left(server, family)
        assert not [file for file in of_driver if file.exists()]  # the gateway ends last


def test_sigkill_of_the_parent_while_it_loads_leaves_nothing(text_model: str) -> None:
    with start(text_model, "--workers", "2") as server:
        eventually(lambda: len(workers_of(server)) == 2, server.output, 10.0)
        family = family_of(server)
        server.process.kill()
        server.process.wait(END_S)
        assert_nothing_left(server, family)


def test_two_servers_do_not_disturb_each_other(text_model: str) -> None:
    prompt, options = "The capital of France is", {"max_tokens": 8, "ignore_eos": True}
    with start(text_model) as one, start(text_model, "--workers", "2") as two:
        with Client(one.wait_ready()) as first, Client(two.wait_ready()) as second:
            answers = [client.stream(prompt, **options) for client in (first, second)]
            texts = {stream.completion().text for stream in answers}
        assert len(texts) == 1
        one.stop()
        with Client(two.wait_ready()) as second:
            assert {second.generate(prompt, **options).text} == texts


def test_a_server_listens_on_loopback_tcp_when_asked(text_model: str) -> None:
    with start(text_model, "--bind", "tcp://127.0.0.1:0") as server:
        endpoint = server.wait_ready()
        assert endpoint.startswith("tcp://127.0.0.1:")
        with Client(endpoint) as client:
            assert client.generate("Hello", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
        listening = [
            connection.laddr
            for process in (psutil.Process(server.process.pid), *family_of(server))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [f"tcp://{address.ip}:{address.port}" for address in listening] == [endpoint]


def test_a_taken_port_is_an_error_that_names_it(text_model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with start(text_model, "--bind", bind) as server:
            with pytest.raises(ServerDied) as ended:
                server.wait_ready()
            assert server.process.returncode > 0
    assert bind in ended.value.output
    assert "Traceback" not in ended.value.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "3"], "3 CPU workers cannot split"),
        (["-n", "0:10;1:10"], "the counts add up to 20, but the model has 2 layers"),
        (["--dtype", "int3"], "--dtype"),
        (["--bind", "tcp://0.0.0.0:5555"], "0.0.0.0"),
    ],
)
def test_a_users_mistake_ends_in_one_message(text_model: str, arguments: list[str], message: str) -> None:
    with ServerProcess("-m", text_model, "--device", "cpu", *arguments) as server:
        with pytest.raises(ServerDied) as ended:
            server.wait_ready(60)
        assert server.process.returncode > 0
    assert message in ended.value.output
    assert "Traceback" not in ended.value.output


def test_a_server_ends_with_the_program_that_started_it_for_a_while(text_model: str) -> None:
    program = (
        "import sys, time; from mgpu.launch.server_process import ServerProcess\n"
        "server = ServerProcess('-m', sys.argv[1], '--device', 'cpu'); print(server.process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, text_model], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    eventually(lambda: not is_alive(server), "the server outlives its owner", END_S)
