"""Start one child, tell it its spec, notice its death, and make sure that it ends."""

import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from mgpu.orchestrator.processes.task_limits import task_limit_hint
from mgpu.protocol.internal.process.child import WAKE_UP, frame_spec

log = logging.getLogger(__name__)

KILL_S = 10.0
"""How long a killed process may take to vanish."""
_REAP_S = 1.0
"""How long the killed orphans of a killed process may take to vanish."""
LIMITS = {
    errno.EAGAIN: "the limit of processes is reached (ulimit -u, or TasksMax in a unit)",
    errno.ENOMEM: "memory has run out",
    errno.EMFILE: "the limit of open files is reached (ulimit -n, or LimitNOFILE in a unit)",
}
"""What an error at a start of a process means, with the way out."""
_PAGE = 4096
_PIPE_BYTES = 1 << 20
"""Size of the standard input. Writing a spec, with the keys and weights of many clients, never waits for the child."""


class ProcessStartError(OSError):
    """A child cannot be started; the text names it and what is lacking."""

    def __init__(self, name: str, error: OSError) -> None:
        hint = LIMITS.get(error.errno or 0)
        super().__init__(f"{name} cannot be started: {error}" + (f"; {hint}" if hint else ""))


class ChildProcess:
    """A process in its own session. Its standard input stays open: end of file tells it that the parent is gone.

    Start it from the main thread: the child asks the kernel to be killed when the thread that made it ends.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        spec: bytes | None,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Start ``command``. Without a ``spec`` it waits for `tell`. ProcessStartError."""
        self.name = name
        # Its own session: Ctrl-C reaches the parent only. Standard output may be a pipe of the user's: keep it clean.
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=2, env=env, pass_fds=pass_fds, start_new_session=True
            )
        except OSError as error:
            raise ProcessStartError(name, error) from error
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # this user has too many large pipes: a small one must do
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.pid = self._process.pid
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError as error:  # no descriptor is left, so its end could not be seen
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            raise ProcessStartError(name, error) from error
        if spec is None:
            return
        try:
            self.tell(spec)
        except ValueError:
            self.kill()
            raise

    def tell(self, spec: bytes) -> None:
        """Write its spec, once. ValueError for a spec so large that writing would wait for the child."""
        assert self._process.stdin is not None
        room = fcntl.fcntl(self._process.stdin, fcntl.F_GETPIPE_SZ) - _PAGE
        if len(spec) > room:
            raise ValueError(f"the spec of {self.name} has {len(spec)} bytes, at most {room} fit")
        with contextlib.suppress(BrokenPipeError):  # died already; its pidfd says so
            self._process.stdin.write(frame_spec(spec))
            self._process.stdin.flush()

    def wake_up(self) -> None:
        """Tell a process that waits for its spec that this comes soon."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # as above
            self._process.stdin.write(WAKE_UP)
            self._process.stdin.flush()

    def exit_status(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs. The process is not reaped."""
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def is_stopped(self) -> bool:
        """Return whether somebody has stopped it (SIGSTOP, a debugger), so that it cannot do anything."""
        try:
            with open(f"/proc/{self.pid}/stat", encoding="latin-1") as file:
                return file.read().rpartition(") ")[2][:1] in ("T", "t")
        except OSError:
            return False

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._process.returncode is not None:  # reaped: its pidfd may be a descriptor of something else by now
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def close_stdin(self) -> None:
        """Let the child see end of file, its sign to stop."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self, deadline_s: float, interrupt_fd: int = -1) -> bool:
        """Return whether it ends before CLOCK_MONOTONIC ``deadline_s`` and before ``interrupt_fd`` is readable."""
        if self._process.returncode is not None:
            return True
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if interrupt_fd >= 0:
            poller.register(interrupt_fd, select.POLLIN)
        ready = poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000)
        return any(fd == self.pidfd for fd, _ in ready)

    def kill(self) -> None:
        """Kill the whole session and collect the exit status; a second call does nothing."""
        if self._process.returncode is not None:
            return
        # Before the leader is reaped its process group id cannot belong to anyone else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.close_stdin()
        try:
            self._process.wait(KILL_S)
        except subprocess.TimeoutExpired:  # in the kernel, for example in a GPU's driver: nothing can hurry it
            log.error("%s (process %d) does not die, %g s after SIGKILL; see dmesg", self.name, self.pid, KILL_S)
            return
        os.close(self.pidfd)
        _reap_orphans(self.pid)


def _reap_orphans(group: int) -> None:
    """Collect what a killed child leaves of its process group, such as the template process of a gateway.

    Orphans become children of the first process of the PID namespace, or of a subreaper. If this is another process,
    none of the group is a child of this one.
    """
    deadline_s = time.monotonic() + _REAP_S
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline_s:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.001)


def count_memory_kills() -> int:
    """Return how many processes the kernel has killed for want of memory; 0 where it does not say."""
    try:
        with open("/proc/vmstat", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except OSError:
        return 0


def describe_exit(status: int) -> str:
    """Say in words how a process ended."""
    if status >= 0:
        return f"exited with status {status}" + (task_limit_hint() if status else "")
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "an unknown signal"
    hint = task_limit_hint() if -status in (signal.SIGABRT, signal.SIGSEGV) else ""
    if -status == signal.SIGKILL:
        hint = "; the kernel does that when memory runs out (see dmesg)"
    return f"was killed by signal {-status} ({name}){hint}"
