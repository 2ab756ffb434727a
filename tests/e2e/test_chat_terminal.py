"""``mgpu-launch chat`` on a terminal: Ctrl-C ends the answer, not the program."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

from mgpu.launch.server_process import ServerProcess

TURN_S = 60.0


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, server: ServerProcess, *arguments: str) -> None:
        self.screen = b""
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mgpu.launch.cli", *arguments],
            env=server.environ,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
        )
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: bytes, after: int = 0) -> int:
        """Read until ``text`` shows up beyond a place on the screen; return the place behind it."""
        deadline_s = time.monotonic() + TURN_S
        while (found := self.screen.find(text, after)) < 0:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.screen
            if select.select([self.fd], [], [], left_s)[0]:
                self.screen += os.read(self.fd, 65536)
        return found + len(text)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TURN_S)
        os.close(self.fd)


def test_ctrl_c_ends_the_answer_and_the_next_turn_works(server: ServerProcess, endpoint: str) -> None:
    terminal = Terminal(server, "chat", "--max-tokens", "600")
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
