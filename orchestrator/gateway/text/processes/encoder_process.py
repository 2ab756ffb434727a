"""Work on text in processes of their own, which are killed when they take too long or too much memory.

A regular expression of a tokenizer can run for hours, a call in C inside a template can make gigabytes, and either may
abort. No sandbox stops that, and no thread can be ended. The kernel can end a process. So one process (encoder.py)
loads the tokenizer, and those that do the work are forked from it: a killed one is replaced in milliseconds.
"""

import errno
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from signal import SIGKILL, pidfd_send_signal

from mgpu.orchestrator.gateway.text.processes.encoder_messages import (
    ENCODER,
    LENGTH,
    MAX_MESSAGE_BYTES,
    EncoderSpec,
    TextReply,
    TextTask,
)
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.model.facts import CheckpointFormat

COMMAND = (sys.executable, "-m", "mgpu.orchestrator.gateway.text.processes.encoder")
CPU_LIMIT_S = 4.0
"""Of one task; a megabyte of text takes about half a second."""
WALL_LIMIT_S = 20.0
"""Longer, for machines with too few cores for all that runs."""
MEMORY_BYTES = 1 << 30
MOST_IDLE = 2
"""Processes that wait for work: as many as are used at once."""
START_LIMIT_S = 60.0
FORK_LIMIT_S = 10.0


class EncoderFailed(Exception):
    """The processes cannot be started: no fault of the text."""


def reason_of(error: Exception) -> str:
    """Say what a process that cannot be started lacks."""
    if isinstance(error, OSError) and error.errno == errno.EAGAIN:
        return "the limit of processes is reached (ulimit -u, or TasksMax in a unit)"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory has run out"
    return str(error)


class EncoderProcesses:
    """The text side of one model. Any number of threads may use it; each has a process to itself meanwhile."""

    def __init__(
        self,
        path: str,
        model_format: CheckpointFormat,
        vocab_size: int,
        cpu_limit_s: float = CPU_LIMIT_S,
        wall_limit_s: float = WALL_LIMIT_S,
    ) -> None:
        self._spec = EncoderSpec(path, model_format, vocab_size, cpu_limit_s, MEMORY_BYTES)
        self._wall_limit_s = wall_limit_s
        self._lock = threading.Lock()
        self._loader: _Loader | None = None
        self._is_closed = False
        self._idle: deque[_Encoder] = deque()

    def start(self) -> None:
        """Begin to load the tokenizer, without waiting for it. If no process can be started, the first task tells."""
        if self._lock.acquire(blocking=False):  # else a thread is at it, and waits
            try:
                with suppress(OSError):
                    self._loader = self._loader or _Loader(self._spec)
            finally:
                self._lock.release()

    def do(self, task: TextTask) -> TextReply:
        """Return the result, or an error for the client. EncoderFailed, OSError if no process can be started."""
        encoder = self._take_idle() or self._fork()
        reply = encoder.ask(task, self._wall_limit_s)
        if reply is None:
            limits = f"{self._spec.cpu_limit_s:g} s of CPU time or {self._spec.memory_bytes >> 20} MiB"
            what = "this text" if task.structured_outputs is None else "this text, or on its structured_outputs,"
            return TextReply(error=f"the process that worked on {what} has ended; it may take {limits}")
        if len(self._idle) < MOST_IDLE and not reply.is_last:
            self._idle.append(encoder)
        return reply

    def _take_idle(self) -> "_Encoder | None":
        """Return a process that waits for work. One that has ended meanwhile must not cost the next text."""
        with suppress(IndexError):
            while True:
                encoder = self._idle.pop()
                if encoder.is_alive():
                    return encoder
        return None

    def _fork(self) -> "_Encoder":
        """Return a new process. If the one to fork from is gone, it is started again, once."""
        with self._lock:
            for _ in range(2):
                if self._is_closed:
                    break
                self._loader = self._loader or _Loader(self._spec)
                with suppress(OSError, EOFError):
                    return self._loader.fork()
                self._loader.close()
                self._loader = None
        raise EncoderFailed("no process for texts could be started")

    def close(self) -> None:
        """Kill all processes, and start no others. What they work on ends with an error."""
        self._is_closed = True
        if (loader := self._loader) is not None:
            loader.close()


class _Loader:
    """The process that has loaded the tokenizer. It is killed with those forked from it when this is dropped."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                process = subprocess.Popen(COMMAND, stdin=theirs.fileno())
        except BaseException:
            self._control.close()
            raise
        self.close = weakref.finalize(self, _end, process, self._control)
        with suppress(OSError):  # a process that has ended at once is noticed by `fork`
            self._control.send(ENCODER.encode(spec))
        self._is_ready = False

    def fork(self) -> "_Encoder":
        """Return a new process. OSError, EOFError if that cannot be done."""
        if not self._is_ready:
            self._control.settimeout(START_LIMIT_S)
            if not self._control.recv(16):
                raise EOFError
            self._is_ready = True
        self._control.settimeout(FORK_LIMIT_S)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"f"], [theirs.fileno()])
            _, fds, _, _ = socket.recv_fds(self._control, 16, 1)
            if not fds:
                raise EOFError
        except BaseException:
            ours.close()
            raise
        return _Encoder(ours, fds[0])


class _Encoder:
    """A process that does one task after the other. It is killed when this is dropped."""

    def __init__(self, peer: socket.socket, pidfd: int) -> None:
        self._socket, self._pidfd = peer, pidfd
        self._end = weakref.finalize(self, _kill, peer, pidfd)

    def is_alive(self) -> bool:
        poller = select.poll()
        poller.register(self._pidfd, select.POLLIN)
        return not poller.poll(0)

    def ask(self, task: TextTask, limit_s: float) -> TextReply | None:
        """Return the reply; None if the process has ended, or has been killed because none came."""
        deadline_s = time.monotonic() + limit_s
        data = ENCODER.encode(task)
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(LENGTH.pack(len(data)) + data)
            [size] = LENGTH.unpack(self._read(LENGTH.size, deadline_s))
            if size > MAX_MESSAGE_BYTES:
                raise EOFError
            reply = ENCODER.decode(self._read(size, deadline_s))
        except (EOFError, OSError, CodecError):
            self._end()
            return None
        return reply if isinstance(reply, TextReply) else None

    def _read(self, size: int, deadline_s: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._socket.settimeout(max(1e-3, deadline_s - time.monotonic()))
            part = self._socket.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def _end(process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    control.close()
    process.kill()
    process.wait()


def _kill(peer: socket.socket, pidfd: int) -> None:
    with suppress(OSError):
        pidfd_send_signal(pidfd, SIGKILL)
    os.close(pidfd)
    peer.close()
