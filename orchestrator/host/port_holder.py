"""Say which process has a port that is taken."""

import contextlib

import psutil

_COMMAND_CHARS = 60


def port_holder(port: int) -> str:
    """Describe the process that listens on a TCP port, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return process_text(_first_holder(psutil.Process(connection.pid), port).pid)
    return f"another program, perhaps of another user (sudo ss -ltnp 'sport = :{port}' shows it),"


def _first_holder(process: psutil.Process, port: int) -> psutil.Process:
    """Return the process from which others have inherited the socket: the one to end."""
    with contextlib.suppress(psutil.Error, OSError):
        while (parent := process.parent()) is not None and any(
            each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in parent.net_connections("tcp")
        ):
            process = parent
    return process


def process_text(pid: int) -> str:
    """Return a process with the beginning of its command line."""
    with contextlib.suppress(psutil.Error, OSError):
        command = " ".join(psutil.Process(pid).cmdline())
        shown = ascii(command)[1:-1]
        return f"process {pid} ({shown if len(shown) <= _COMMAND_CHARS else shown[: _COMMAND_CHARS - 3] + '...'})"
    return f"process {pid}"
