"""``mgpu-launch chat`` on a terminal, against a gateway whose engine says what a test wants."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.servers.gateway_process import GatewayProcess, make_model_folder, says
from harness.terminal import TURN_S, Terminal


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    with GatewayProcess(make_model_folder(tmp_path_factory.mktemp("tiny-model"))) as gateway:
        gateway.set_info(max_seq_len=4096, kv_tokens=4096)
        yield gateway


@pytest.fixture
def terminals(gateway: GatewayProcess) -> Iterator[list[Terminal]]:
    gateway.engine.reset()
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def chat(gateway: GatewayProcess, terminals: list[Terminal], *arguments: str, **more: str) -> Terminal:
    environ = {**os.environ, "MGPU_ENDPOINT": gateway.endpoint, "TERM": "xterm", "COLUMNS": "70", "LINES": "24"}
    terminal = Terminal(environ, "chat", *arguments, **more)
    terminals.append(terminal)
    return terminal


def leave(terminal: Terminal) -> None:
    terminal.type("/bye\n")
    assert terminal.process.wait(TURN_S) == 0


MARKDOWN = "Some **bold** words.\n\n- one\n- `two`\n\n```\ncode\n```\n\nThe end"


def test_markdown_is_rendered_and_the_speed_follows(gateway: GatewayProcess, terminals: list[Terminal]) -> None:
    gateway.engine.script = says(MARKDOWN)
    terminal = chat(gateway, terminals)
    terminal.turn("hi\n")
    assert b"\x1b[1mbold\x1b[0m" in terminal.screen
    assert "• ".encode() in terminal.screen
    terminal.wait_for(b"tokens/s]")
    assert f"{len(MARKDOWN) + 1} tokens, first after".encode() in terminal.screen
    leave(terminal)


@pytest.mark.parametrize(("arguments", "more"), [(["--no-markdown"], {}), ([], {"TERM": "dumb"})])
def test_markdown_is_shown_as_it_is_where_it_is_not_wanted(
    gateway: GatewayProcess, terminals: list[Terminal], arguments: list[str], more: dict[str, str]
) -> None:
    gateway.engine.script = says(MARKDOWN)
    terminal = chat(gateway, terminals, *arguments, **more)
    terminal.turn("hi\n")
    terminal.wait_for(b"tokens/s]")
    assert MARKDOWN.replace("\n", "\r\n").encode() in terminal.screen
    leave(terminal)


@pytest.mark.parametrize("arguments", [[], ["--no-markdown"]])
def test_a_model_cannot_command_the_terminal(
    gateway: GatewayProcess, terminals: list[Terminal], arguments: list[str]
) -> None:
    gateway.engine.script = says("a\x1b]52;c;Zm9v\x07b\x9b31mc\x08d")
    terminal = chat(gateway, terminals, *arguments)
    terminal.turn("hi\n")
    terminal.wait_for(b"tokens/s]")
    assert b"a]52;c;Zm9vb31mcd" in terminal.screen
    leave(terminal)


def test_ctrl_c_ends_the_answer_only_however_often_it_is_pressed(
    gateway: GatewayProcess, terminals: list[Terminal]
) -> None:
    gateway.engine.script = lambda submit: iter(b"word " * 700)
    terminal = chat(gateway, terminals)
    place = terminal.wait_for(b"> ")
    for _ in range(3):
        terminal.type("go on\n")
        place = terminal.wait_for(b"word word", place)
        for _ in range(5):
            os.killpg(terminal.process.pid, signal.SIGINT)
        place = terminal.wait_for(b"[stopped]", place)
        place = terminal.wait_for(b"> ", place)
    gateway.engine.wait(lambda: not gateway.engine._running)
    terminal.type("half a line")
    place = terminal.interrupt(terminal.wait_for(b"half a line", place))
    terminal.type('"""a block')
    terminal.type("\n")
    terminal.interrupt(terminal.wait_for(b". ", place))
    leave(terminal)


def test_lines_that_are_pasted_are_one_message(
    gateway: GatewayProcess, terminals: list[Terminal], tmp_path: Path
) -> None:
    gateway.engine.script = says("ok")
    terminal = chat(gateway, terminals)
    place = terminal.turn("\x1b[200~def f():\n    return 1\n\x1b[201~\n")
    terminal.turn(f"/save {tmp_path / 'talk.json'}\n", place)
    leave(terminal)
    [asked, _] = json.loads((tmp_path / "talk.json").read_text())
    assert asked["content"].strip() == "def f():\n    return 1"


def test_the_history_lasts_and_is_private(gateway: GatewayProcess, terminals: list[Terminal], tmp_path: Path) -> None:
    gateway.engine.script = says("ok")
    state = {"XDG_STATE_HOME": str(tmp_path)}
    first = chat(gateway, terminals, **state)
    place = first.turn("first message\n")
    place = first.turn('"""two\n', place, b". ")
    first.turn('lines"""\n', place)
    leave(first)
    file = tmp_path / "mgpu" / "chat_history"
    assert file.stat().st_mode & 0o777 == 0o600
    second = chat(gateway, terminals, **state)
    place = second.turn("\x1b[A\x1b[A\x1b[A\n")  # /bye, the block, the first message
    second.turn(f"/save {tmp_path / 'talk.json'}\n", place)
    leave(second)
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "first message"
    assert [json.loads(line) for line in file.read_text().splitlines()][:3] == ["first message", "two\nlines", "/bye"]
    third = chat(gateway, terminals, "--no-history", **state)
    third.turn("secret\n")
    leave(third)
    assert "secret" not in file.read_text()


def test_tab_completes_commands(gateway: GatewayProcess, terminals: list[Terminal]) -> None:
    terminal = chat(gateway, terminals)
    terminal.turn("/he\t\n")
    assert b"begins and ends a message of several lines" in terminal.screen
    leave(terminal)
