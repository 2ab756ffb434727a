"""Start, end and endpoint of the gateway process."""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import zmq

from harness.servers.gateway_process import DEADLINE_S, GatewayProcess, assert_serves
from harness.servers.raw_peer import RawPeer, read_until_closed
from harness.waiting import eventually
from mgpu import Client, RequestFailed
from mgpu.protocol.front.framing import pack, unpack
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewayFailure, GatewayReady, Outputs, Ping


def test_before_the_engine_is_ready_health_answers_and_requests_are_told_to_wait(model_folder: Path) -> None:
    with GatewayProcess(model_folder, ready=False) as gateway, Client(gateway.endpoint) as client:
        assert client.health().state == "starting"
        with pytest.raises(RequestFailed) as caught:
            client.generate([1])
        assert (caught.value.code, caught.value.retry_after_s) == ("not_ready", 1.0)
        gateway.engine.tell(EngineInfo("ready", 512, 4096, ""))
        gateway.engine.wait(lambda: gateway.engine.known_state == "ready")
        assert client.generate([1], max_tokens=1).token_ids == (1,)


@pytest.mark.parametrize("message", [Ping(), Outputs([], [], [], [], [], [])])
def test_whatever_the_gateway_reads_makes_it_say_that_it_lives(model_folder: Path, message: Ping | Outputs) -> None:
    with GatewayProcess(model_folder, ready=False) as gateway:
        gateway.engine.tell(message)
        gateway.engine.wait(lambda: gateway.engine.signs_of_life >= 1)


def test_the_process_for_text_loads_the_tokenizer_once_the_server_is_ready(model_folder: Path) -> None:
    with GatewayProcess(model_folder, ready=False, prepares_text=True) as gateway:

        def helpers() -> list[psutil.Process]:
            return psutil.Process(gateway.process.pid).children(recursive=True)

        assert not helpers(), "the start of the workers comes first"
        gateway.set_info()
        [loader] = eventually(helpers, lambda: "no process for text")
        with Client(gateway.endpoint) as client:
            client.chat([{"role": "user", "content": "x"}], max_tokens=1)
        assert loader.pid in {each.pid for each in helpers()}, "the first chat needs no other"


def test_the_socket_is_private(model_folder: Path) -> None:
    with GatewayProcess(model_folder, ready=False) as gateway:
        assert os.stat(gateway.endpoint.removeprefix("ipc://")).st_mode & 0o077 == 0


def test_a_socket_that_was_removed_is_bound_again_and_connections_stay(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as gateway, Client(gateway.endpoint) as before:
        assert before.generate([1], max_tokens=1).token_ids == (1,)
        for name in ("front", "front.lock"):
            (gateway.runtime_dir / name).unlink()
        with Client(gateway.endpoint) as after:  # ZeroMQ tries again until there is somebody
            assert after.generate([2], max_tokens=1).token_ids == (2,)
        assert before.generate([3], max_tokens=1).token_ids == (3,)


def test_end_of_standard_input_fails_what_runs_and_removes_the_runtime_folder(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as gateway, Client(gateway.endpoint) as client:
        gateway.engine.going.clear()
        stream = client.stream([1])
        gateway.engine.wait(lambda: len(gateway.engine.submits) == 1)
        assert gateway.process.stdin is not None
        gateway.process.stdin.close()
        with pytest.raises(RequestFailed) as caught:
            next(stream)
        assert caught.value.code == "stopped"
        assert gateway.process.wait(DEADLINE_S) == 0
        assert not gateway.runtime_dir.exists()


def test_sigint_is_left_to_the_parent_and_sigterm_stops(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as gateway:
        gateway.process.send_signal(signal.SIGINT)
        assert_serves(gateway.endpoint)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(DEADLINE_S) == 0
        assert gateway.runtime_dir.exists()  # the parent lives and cleans up itself


def test_a_second_server_cannot_take_a_live_endpoint(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as first:
        with GatewayProcess(model_folder, bind=first.endpoint, ready=False) as second:
            assert isinstance(second.first, GatewayFailure)
            assert "another server is listening" in second.first.message
            assert second.process.wait(DEADLINE_S) == 1
        assert_serves(first.endpoint)


def test_a_socket_file_that_a_dead_server_left_is_replaced(model_folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mgpu-test-") as folder:
        endpoint = f"ipc://{folder}/front"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(f"{folder}/front")
        with GatewayProcess(model_folder, bind=endpoint) as gateway, Client(endpoint) as client:
            assert client.generate([1], max_tokens=1).token_ids == (1,)
            assert gateway.endpoint == endpoint


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp_on_the_loopback_resolves_port_zero(model_folder: Path, host: str) -> None:
    if host == "[::1]" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with GatewayProcess(model_folder, bind=f"tcp://{host}:0") as gateway, Client(gateway.endpoint) as client:
        assert int(gateway.endpoint.rpartition(":")[2]) > 0
        assert client.generate([1], max_tokens=1).token_ids == (1,)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_a_forged_zmtp1_greeting_on_tcp_is_not_delivered(model_folder: Path) -> None:
    with GatewayProcess(model_folder, bind="tcp://127.0.0.1:0") as gateway:
        port = int(gateway.endpoint.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw:
            raw.sendall(b"\x01\x00\x0d\x00hello-forged")
            received = read_until_closed(raw)
        assert b"mgpu1" not in received  # a delivered message would have been answered with bad_version
        assert_serves(gateway.endpoint)


@pytest.mark.parametrize(("bind", "words"), [
    ("tcp://0.0.0.0:5000", "loopback"),
    ("tcp://*:5000", "loopback"),
    ("tcp://example.org:5000", "loopback"),
    ("tcp://::1:5000", "in brackets, such as tcp://[::1]:5000"),
    ("ipc://relative/path", "absolute"),
    ("ipc:///" + "x" * 120, "107"),
    ("ipc:///no-such-folder-here/front", "does not exist"),
    ("ipc:///dev/null", "not a socket"),
    ("udp://127.0.0.1:1", "use ipc://"),
])  # fmt: skip
def test_an_unsuitable_endpoint_is_refused_with_the_way_out(model_folder: Path, bind: str, words: str) -> None:
    with GatewayProcess(model_folder, bind=bind, ready=False) as gateway:
        assert isinstance(gateway.first, GatewayFailure)
        assert words in gateway.first.message
        assert gateway.process.wait(DEADLINE_S) == 1


def test_an_unusable_tokenizer_ends_the_process_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with GatewayProcess(tmp_path, ready=False) as gateway:
        assert isinstance(gateway.first, GatewayFailure)
        assert "tokenizer.json" in gateway.first.message
        assert gateway.first.is_mistake
        assert gateway.process.wait(DEADLINE_S) == 1


def test_without_a_tokenizer_ids_still_work_and_text_is_refused(tmp_path: Path) -> None:
    with GatewayProcess(tmp_path) as gateway, Client(gateway.endpoint) as client:
        assert isinstance(gateway.first, GatewayReady)
        done = client.generate([1, 2], max_tokens=2, logprobs=1)
        assert (done.token_ids, done.text) == ((1, 2), "")
        with pytest.raises(RequestFailed, match="no tokenizer"):
            client.generate("text")


def test_a_wrong_start_says_who_starts_this_command() -> None:
    command = [sys.executable, "-m", "mgpu.orchestrator.gateway"]
    done = subprocess.run(command, input=b"\x00", capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert b"mgpu-launch serve" in done.stderr


def test_two_gateways_do_not_disturb_each_other(model_folder: Path) -> None:
    with GatewayProcess(model_folder) as one, GatewayProcess(model_folder) as two:
        with Client(one.endpoint) as first, Client(two.endpoint) as second:
            assert first.generate([1], max_tokens=1).token_ids == (1,)
            assert second.generate([2], max_tokens=1).token_ids == (2,)
        assert [len(each.engine.submits) for each in (one, two)] == [1, 1]


def test_peers_that_ask_for_one_routing_id_get_their_own_answers_only(model_folder: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with GatewayProcess(model_folder) as gateway:
        sockets = [context.socket(zmq.DEALER) for _ in range(3)]
        for number, each in enumerate(sockets):
            each.setsockopt(zmq.LINGER, 0)
            each.setsockopt(zmq.ROUTING_ID, b"same")
            each.connect(gateway.endpoint)
            each.send_multipart(pack({"type": "detokenize", "id": number, "token_ids": [65 + number]}))
        for number, each in enumerate(sockets):
            assert each.poll(int(DEADLINE_S * 1000))
            answer = unpack(each.recv_multipart())
            assert (answer["id"], answer["text"]) == (number, "ABC"[number])
            assert not each.poll(0)
            each.close()
    context.term()


def test_more_half_open_connections_than_the_usual_limit_of_files_do_no_harm(model_folder: Path) -> None:
    with GatewayProcess(model_folder, before="ulimit -S -n 256;") as gateway:
        path = gateway.endpoint.removeprefix("ipc://")
        idle = [socket.socket(socket.AF_UNIX) for _ in range(400)]
        for each in idle:
            each.connect(path)
            each.sendall(b"\xff\0\0\0\0\0\0\0\1\x7f")  # the first half of a greeting
        assert_serves(gateway.endpoint)
        for each in idle:
            each.close()


def test_a_parent_killed_outright_leaves_neither_process_nor_folder(tmp_path: Path, model_folder: Path) -> None:
    """Even when another process holds the other end of the gateway's standard input, so that it never ends."""
    source = f"""
import sys, time
from pathlib import Path
import subprocess
from harness.servers.gateway_process import GatewayProcess
from harness.servers.raw_peer import read_until_closed
gateway = GatewayProcess(Path({str(model_folder)!r}))
holder = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          pass_fds=[gateway.process.stdin.fileno()])
print(gateway.process.pid, holder.pid, gateway.runtime_dir, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        gateway_pid, holder_pid, runtime_dir = parent.stdout.readline().split()
        ended = os.pidfd_open(int(gateway_pid))
        parent.kill()
    try:
        assert select.select([ended], [], [], DEADLINE_S)[0], "the gateway outlives its parent"
        assert not Path(runtime_dir).exists(), list(Path(runtime_dir).iterdir())
    finally:
        os.close(ended)
        os.kill(int(holder_pid), signal.SIGKILL)


@pytest.mark.parametrize(("level", "is_logged"), [("error", False), ("INFO", True), ("", True)])
def test_the_gateway_logs_from_the_level_that_the_server_does(model_folder: Path, level: str, is_logged: bool) -> None:
    gateway = GatewayProcess(model_folder, before=f"export MGPU_LOG_LEVEL={level};")
    try:
        gateway.engine.going.clear()
        peer = RawPeer(gateway.endpoint)
        peer.say(type="generate", id=1, prompt_ids=[5], max_tokens=500, stream=True)
        assert peer.hear()["type"] == "accepted"
        peer.close()
        gateway.engine.going.set()
        gateway.engine.wait(lambda: bool(gateway.engine.cancels))
    finally:
        log = gateway.close()
    assert ("is gone; 1 requests end" in log) == is_logged


def test_connections_that_leave_do_not_fill_the_log(model_folder: Path) -> None:
    gateway = GatewayProcess(model_folder)
    try:
        for request_id in range(30):
            gateway.engine.going.clear()
            peer = RawPeer(gateway.endpoint)
            peer.say(type="generate", id=request_id, prompt_ids=[5], max_tokens=500, stream=True)
            assert peer.hear()["type"] == "accepted"
            known = len(gateway.engine.cancels)
            peer.close()
            gateway.engine.going.set()
            gateway.engine.wait(lambda known=known: len(gateway.engine.cancels) > known)
    finally:
        log = gateway.close()
    assert "is gone; 1 requests end" in log
    assert log.count("requests end") <= 10, log
