"""A command on a pseudo-terminal."""

import os
import pty
import select
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
        deadline_s = time.monotonic() + TURN_S
        while (found := self.screen.find(text, after)) < 0:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.screen
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
