"""Render chat templates in a process of their own, which is killed when it takes too long or too much memory.

The sandbox of chat_template.py cannot stop one call in C that makes gigabytes, or a loop that doubles a text forty
times. The kernel can, but only for a whole process. Messages are four bytes of length, then JSON.
"""

import json
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from mgpu.orchestrator.gateway.text.chat_template import TIME_LIMIT_S, ChatTemplate, ChatTemplateError

COMMAND = (sys.executable, "-m", "mgpu.orchestrator.gateway.text.template_process")
MEMORY_BYTES = 1 << 30
"""Address space of the process; an interpreter that has rendered a long prompt uses a tenth of it."""
START_LIMIT_S = 30.0
MARGIN_S = 1.0
"""How much longer than the sandbox's own limit the process may take before it is killed."""
_MAX_MESSAGE_BYTES = 128 << 20
_LENGTH = struct.Struct("<I")


class TemplateProcess:
    """Renders one model's template. The process starts when it is first needed, and again after it was killed.

    Any number of threads may render; they take turns.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], time_limit_s: float = TIME_LIMIT_S) -> None:
        self._setup = {"source": source, "special_tokens": dict(special_tokens), "time_limit_s": time_limit_s}
        self._render_limit_s = time_limit_s + MARGIN_S
        self._lock = threading.Lock()
        self._renderer: _Renderer | None = None

    def render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, object] | None = None) -> str:
        """Return the prompt for an answer to ``messages``. ChatTemplateError as in `ChatTemplate`, or at the limits."""
        request = {"messages": [dict(message) for message in messages], "options": dict(options or {})}
        with self._lock:
            renderer, self._renderer = self._renderer, None  # restored only if it can be used again
            renderer = renderer or self._start()
            reply = renderer.ask(request, self._render_limit_s)
            self._renderer = renderer
        return _text_of(reply)

    def _start(self) -> "_Renderer":
        renderer = _Renderer()
        _text_of(renderer.ask(self._setup, START_LIMIT_S))
        return renderer


def _text_of(reply: Mapping[str, str]) -> str:
    if "text" not in reply:
        raise ChatTemplateError(reply.get("error", "the chat template's process gave no answer"))
    return reply["text"]


class _Renderer:
    """A running process and the socket that is its standard input and output. It is killed when this is dropped."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(COMMAND, stdin=theirs.fileno(), stdout=theirs.fileno())
        self._end = weakref.finalize(self, _end, process, self._socket)

    def ask(self, message: Mapping[str, object], limit_s: float) -> dict[str, str]:
        """Send a message and return the reply. When none comes, kill the process and raise ChatTemplateError."""
        deadline_s = time.monotonic() + limit_s
        try:
            data = json.dumps(message).encode()
            self._socket.settimeout(limit_s)
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
            [size] = _LENGTH.unpack(self._read(_LENGTH.size, deadline_s))
            if size > _MAX_MESSAGE_BYTES:
                raise EOFError
            reply = json.loads(self._read(size, deadline_s))
        except TimeoutError:
            self._end()
            raise ChatTemplateError(f"the chat template ran for more than {limit_s:g} s") from None
        except (EOFError, OSError, ValueError):
            self._end()
            raise ChatTemplateError("the chat template broke the process that renders it") from None
        return {str(name): str(text) for name, text in reply.items()}  # written by `main`, below

    def _read(self, size: int, deadline_s: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._socket.settimeout(max(1e-3, deadline_s - time.monotonic()))
            part = self._socket.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def _end(process: "subprocess.Popen[bytes]", ours: socket.socket) -> None:
    process.kill()
    process.wait()
    ours.close()


# -- the process itself ------------------------------------------------------------------------------------------------


def main() -> int:
    """Render until standard input ends."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(kind, (limit, limit))
    template: ChatTemplate | None = None
    while header := sys.stdin.buffer.read(_LENGTH.size):
        message = json.loads(sys.stdin.buffer.read(_LENGTH.unpack(header)[0]))
        try:
            if template is None:
                template, text = ChatTemplate(**message), ""
            else:
                text = template.render(**message)
            reply = {"text": text}
        except ChatTemplateError as error:
            reply = {"error": str(error)}
        data = json.dumps(reply).encode()
        sys.stdout.buffer.write(_LENGTH.pack(len(data)) + data)
        sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
