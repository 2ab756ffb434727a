"""SIGHUP: what is read again, what a mistake in it does, and when it means the end of a terminal instead."""

import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.assertions import assert_has_all
from harness.servers.fake_model import solo_tokens
from harness.servers.server_process import DEADLINE_S, ready_server, running_server
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.reload import Reloadable, Reloader
from mgpu.protocol.internal.client_limits import ClientLimits
from mgpu.protocol.internal.gateway_messages import ServerKeys

KEYS = ServerKeys(b"s" * 32, [b"a" * 32])


def values(keys: ServerKeys | None) -> Reloadable:
    return Reloadable(keys, ClientLimits(), 1.0)


def test_other_clients_are_taken_in() -> None:
    changed = values(ServerKeys(KEYS.secret, [b"b" * 32]))
    assert Reloader(KEYS, lambda: changed).read() == changed


@pytest.mark.parametrize(("before", "after", "words"), [
    (KEYS, None, "while the server runs; restart"),
    (None, KEYS, "while the server runs; restart"),
    (KEYS, ServerKeys(b"t" * 32, KEYS.clients), "own key has changed; restart"),
])  # fmt: skip
def test_what_belongs_to_the_socket_cannot_change(
    before: ServerKeys | None, after: ServerKeys | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert Reloader(before, lambda: values(after)).read() is None
    assert_has_all(caplog.text, words, "everything stays as it was")


def test_a_file_that_cannot_be_used_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def read() -> Reloadable:
        raise UserError("line 3 is wrong")

    assert Reloader(KEYS, read).read() is None
    assert "everything stays as it was: line 3 is wrong" in caplog.text


def test_nothing_is_said_of_options_for_the_next_start_when_the_reload_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = Reloadable(None, ClientLimits(), 1.0, ("max_rows",))
    assert Reloader(KEYS, lambda: changed).read() is None
    assert "next start" not in caplog.text
    assert Reloader(None, lambda: changed).read() == changed
    assert "a changed max_rows takes effect at the next start" in caplog.text


def test_a_running_server_reloads_on_sighup_and_goes_on(folder: Path) -> None:
    with ready_server(folder, {"step_s": 0.01}) as server:
        server.begin(1, [1, 2, 3], 60)
        (folder / "reload").write_text("seven")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: "'seven' is not a number" in server.log)
        assert server.reloads == []
        (folder / "reload").write_text("7")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: bool(server.reloads))
        assert [(each.client_keys, each.limits.max_client_requests) for each in server.reloads] == [(None, 7)]
        server.wait_for(lambda: 1 in server.finish)
        assert server.tokens[1] == solo_tokens([1, 2, 3], 60)
        assert server.end(signal.SIGTERM) == -signal.SIGTERM


def test_a_reload_that_comes_while_loading_waits_until_the_server_is_ready(folder: Path) -> None:
    with running_server(folder) as server:
        server.wait_for(lambda: bool(server.infos))
        (folder / "reload").write_text("7")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for(lambda: bool(server.reloads))
        assert any(info.state == "ready" for info in server.infos)


LISTENER = """
import os, select, sys
from mgpu.orchestrator.host.signals import Signals
if len(sys.argv) > 1:
    os.open(sys.argv[1], os.O_RDWR)  # a session leader's first terminal becomes its own
with Signals() as signals:
    for _ in range(2):
        print("ready", flush=True)
        select.select([signals.fd], [], [], 30)
        signals.clear()
        print("reload" if signals.take_reload() else f"stop {signals.received}", flush=True)
"""


def test_the_log_says_what_a_reload_has_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    used = values(KEYS)
    limits = replace(used.client_limits, max_client_requests=3)
    changed = Reloadable(ServerKeys(KEYS.secret, [b"b" * 32]), limits, 7.0)
    answers = iter((used, changed, changed))
    reloader = Reloader(KEYS, lambda: next(answers), used=used)
    for _ in range(3):
        reloader.read()
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "nothing has changed" in first
    assert_has_all(
        second, "max_client_requests 256 -> 3", "drain_timeout 1 -> 7", "may connect, ", "may not connect any"
    )
    assert "nothing has changed" in third


def listen(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LISTENER, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_service_without_a_terminal_takes_every_sighup_for_a_reload() -> None:
    with listen() as process:
        for _ in range(2):
            assert next_line(process) == "ready"
            process.send_signal(signal.SIGHUP)
            assert next_line(process) == "reload"
        assert process.wait(DEADLINE_S) == 0


def test_the_end_of_its_terminal_stops_a_server_and_a_sighup_before_that_does_not() -> None:
    ours, theirs = pty.openpty()
    with listen(os.ttyname(theirs)) as process:
        assert next_line(process) == "ready"
        os.close(theirs)
        process.send_signal(signal.SIGHUP)
        assert next_line(process) == "reload"
        assert next_line(process) == "ready"
        os.close(ours)
        assert next_line(process) == f"stop [{int(signal.SIGHUP)}]"
        assert process.wait(DEADLINE_S) == 0
