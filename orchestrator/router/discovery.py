"""Which servers a router has behind it: typed, listed in a file, or found by a name that is looked up again.

    tcp://10.0.0.5:5555, ipc:///run/a/front.sock    one server
    dns://mgpu-servers.default.svc:5555             a server at each address of the name

A file has one of these on each line. It is read again every few seconds, and so are the addresses: a name server may
take long, so each name is looked up in a thread. While a file or a name cannot be read, what it last said holds.
"""

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from mgpu.orchestrator.errors import UserError

START_S = 5.0
"""How long the start waits for the first addresses of all names."""
MAX_SERVERS = 256
_NAME = re.compile(r"dns://([A-Za-z0-9_.-]{1,253}):(\d{1,5})")
_SERVER = re.compile(r"ipc:///.+|tcp://(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):(\d{1,5})")
_FORMS = "write ipc:///PATH, tcp://ADDRESS:PORT or dns://NAME:PORT"

log = logging.getLogger(__name__)

LookUp = Callable[[str, int], list[str]]


class ServerListError(UserError):
    """The list of servers cannot be used."""

    exit_code = 78


def addresses_of(name: str, port: int) -> list[str]:
    """Return the endpoints at a name's IPv4 addresses, or without any those at its IPv6 addresses. OSError."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    fours = {f"tcp://{each[4][0]}:{port}" for each in found if each[0] == socket.AF_INET}
    sixes = {f"tcp://[{each[4][0]}]:{port}" for each in found if each[0] == socket.AF_INET6}
    return sorted(fours or sixes)


class Discovery:
    """The servers that there are now."""

    def __init__(self, typed: Sequence[str], file: Path | None, look_up: LookUp = addresses_of) -> None:
        """Read everything once. ServerListError if that names no servers, or something else than servers."""
        self._typed = list(typed)
        self._file = file
        self._look_up = look_up
        self._names: dict[str, _Name] = {}
        self._problem = ""
        try:
            self._lines = self._read()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ServerListError(f"--replica-file {file} cannot be read: {why}") from None
        if not self._lines:
            raise ServerListError("no servers: name each with --replica ENDPOINT, or list them in --replica-file FILE")
        self._resolved(self._lines)
        until_s = time.monotonic() + START_S
        for name in self._names.values():
            name.wait(max(0.0, until_s - time.monotonic()))

    def endpoints(self) -> list[str]:
        """Return the endpoints of all servers, each once. It never waits."""
        try:
            self._lines = self._read() or self._lines
            self._problem = ""
        except (OSError, UnicodeDecodeError, ServerListError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("%s cannot be used, and the servers that it last named stay: %s", self._file, error)
        found = list(dict.fromkeys(self._resolved(self._lines)))
        if len(found) > MAX_SERVERS:
            log.error("%d servers are named; the first %d are used", len(found), MAX_SERVERS)
        return found[:MAX_SERVERS]

    def _read(self) -> list[str]:
        lines = [*self._typed, *_lines(self._file)]
        for line in lines:
            check_server(line)
        if len(set(lines)) < len(lines):
            twice = next(each for each in lines if lines.count(each) > 1)
            raise ServerListError(f"{twice} is named twice")
        return lines

    def _resolved(self, lines: Iterable[str]) -> Iterable[str]:
        """Return the lines with the addresses of names in their place, as far as they are known."""
        known, self._names = self._names, {}
        found: list[str] = []
        for line in lines:
            if not (match := _NAME.fullmatch(line)):
                found.append(line)
                continue
            name = self._names[line] = known.get(line) or _Name(match[1], int(match[2]), self._look_up)
            name.refresh()
            found += name.endpoints
        return found


class _Name:
    """A name and the addresses that it last had."""

    def __init__(self, name: str, port: int, look_up: LookUp) -> None:
        self.endpoints: list[str] = []
        self._name, self._port = name, port
        self._look_up = look_up
        self._thread: threading.Thread | None = None
        self._problem = ""

    def refresh(self) -> None:
        """Begin to look it up, unless that is going on."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._ask, name=f"look up {self._name}", daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def _ask(self) -> None:
        try:
            found, problem = self._look_up(self._name, self._port), "it has no addresses"
        except (OSError, UnicodeError) as error:
            found, problem = [], str(error)
        if found:
            self.endpoints, self._problem = found, ""
        elif problem != self._problem:
            self._problem = problem
            kept = f"its last {len(self.endpoints)} addresses stay" if self.endpoints else "it is asked again"
            log.warning("%s cannot be looked up (%s); %s", self._name, problem, kept)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def check_server(line: str) -> None:
    """Raise ServerListError if a line names no server."""
    match = _NAME.fullmatch(line) or _SERVER.fullmatch(line)
    if match is None:
        raise ServerListError(f"{line!r} is no endpoint of a server; {_FORMS}")
    port = match[match.lastindex or 0] if match.lastindex else "1"
    if not 1 <= int(port) <= 65535:
        raise ServerListError(f"{line!r} has the port {port}; ports are 1 to 65535")
