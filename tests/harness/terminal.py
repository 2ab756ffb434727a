"""A command on a pseudo-terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

TURN_S = 60.0


class Terminal:
    """`mgpu-launch` on a pseudo-terminal of its own. It keeps no history unless XDG_STATE_HOME is given."""

    def __init__(self, environ: Mapping[str, str], *arguments: str, **more: str) -> None:
        self.screen = b""
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mgpu.launch.cli", *arguments],
            env={**environ, "XDG_STATE_HOME": "/dev/null/none", **more},
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
        found = self._look_for(text, after, TURN_S)
        assert found >= 0, self.screen
        return found

    def interrupt(self, after: int, prompt: bytes = b"> ") -> int:
        """Press Ctrl-C at a prompt until the next one shows up; return the place behind it.

        Python misses a signal that comes between the echo of a key and its wait for the next key; a person presses
        the key again.
        """
        for _ in range(int(TURN_S)):
            os.killpg(self.process.pid, signal.SIGINT)
            if (found := self._look_for(prompt, after, 1.0)) >= 0:
                return found
        raise AssertionError(self.screen)

    def _look_for(self, text: bytes, after: int, timeout_s: float) -> int:
        deadline_s = time.monotonic() + timeout_s
        while (found := self.screen.find(text, after)) < 0:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return -1
            if select.select([self.fd], [], [], left_s)[0]:
                self.screen += os.read(self.fd, 65536)
        return found + len(text)

    def turn(self, text: str, after: int = 0, prompt: bytes = b"> ") -> int:
        """Type at a prompt; return the place behind the next prompt."""
        place = len(self.screen) if after else self.wait_for(b"> ")
        self.type(text)
        return self.wait_for(prompt, self.wait_for(b"\n", place))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TURN_S)
        os.close(self.fd)
