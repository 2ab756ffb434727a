"""``mgpu-launch chat`` and ``top`` on a terminal."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from harness.terminal import TURN_S, Terminal
from mgpu.launch.server_process import ServerProcess


def test_lines_are_edited_and_commands_are_not_sent(
    random_server: ServerProcess, random_endpoint: str, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    terminal = Terminal(random_server.environ, "chat", "--max-tokens", "30000", TERM="xterm")
    try:
        place = terminal.turn("/set max_tokens 4\n")
        place = terminal.turn("/system Be short.\n", place)
        place = terminal.turn("/helo\n", place)
        assert b"/helo is no command" in terminal.screen
        assert b"/save FILE" in terminal.screen
        place = terminal.turn("Hi therX\x1b[D\x1b[C\x7fe\n", place)  # left, right, backspace
        place = terminal.wait_for(b"tokens/s]", place - 200)
        place = terminal.turn("\x1b[A\n", place)  # the same line again
        place = terminal.turn('"""one\n', place, b". ")
        place = terminal.turn('two"""\n', place)
        place = terminal.turn("/retry\n", place)
        place = terminal.turn(f"/save {file}\n", place)
        terminal.type("/bye\n")
        assert terminal.process.wait(TURN_S) == 0
    finally:
        terminal.close()
    messages = json.loads(file.read_text())
    assert messages[0] == {"role": "system", "content": "Be short."}
    assert [each["content"] for each in messages if each["role"] == "user"] == ["Hi there", "Hi there", "one\ntwo"]


NO_READLINE = "import sys; sys.modules['readline'] = None; from mgpu.launch.cli import main; main()"


def test_without_readline_escape_codes_do_not_reach_the_model(
    random_server: ServerProcess, random_endpoint: str, tmp_path: Path
) -> None:
    typed = f"/set max_tokens 2\nx\x1b[Dy\x1b[A\n/save {tmp_path / 'talk.json'}\n/clear\n/retry\n/bye\n"
    done = subprocess.run(
        [sys.executable, "-c", NO_READLINE, "chat"], env=random_server.environ, input=typed, capture_output=True,
        text=True, timeout=TURN_S, check=True,
    )  # fmt: skip
    assert "there is no message to answer again" in done.stderr
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "xy"


def test_ctrl_c_ends_the_answer_and_the_next_turn_works(random_server: ServerProcess, random_endpoint: str) -> None:
    terminal = Terminal(random_server.environ, "chat", "--max-tokens", "30000")
    try:
        terminal.wait_for(b"> ")
        terminal.type("Write a very long story about a lighthouse.\n")
        place = terminal.wait_for(b"\n", terminal.wait_for(b"lighthouse."))
        terminal.wait_for(b" ", place)  # the answer has begun
        os.killpg(terminal.process.pid, signal.SIGINT)
        place = terminal.wait_for(b"[stopped]", place)
        place = terminal.wait_for(b"> ", place)
        terminal.type("/new\n")
        place = terminal.wait_for(b"> ", place)
        terminal.type("\x04")
        assert terminal.process.wait(TURN_S) == 0
    finally:
        terminal.close()
