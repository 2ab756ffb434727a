"""Hosts that are network namespaces of this machine, with names, addresses and links of their own. Needs root."""

import os
import shutil
import subprocess
import sys
from functools import partial
from itertools import count

from bench.waiting import wait_until

_NUMBERS = count()
_END_S = 10.0


class NoNamespaces(Exception):
    """Namespaces cannot be made here; the text says why."""


def why_not() -> str:
    """Return why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    name = f"mgpu-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"ip netns add: {done.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


class Loopback:
    """The same host as often as one likes: nothing can be cut."""

    def address(self, at: int) -> str:
        """Return the address of every host."""
        return "127.0.0.1"

    def command(self, at: int) -> list[str]:
        """Return what goes before a command: nothing."""
        return []

    def cut(self, at: int) -> None:
        """Raise NoNamespaces."""
        raise NoNamespaces(why_not())

    mend = cut

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Network:
    """``hosts`` namespaces on one switch, numbered from 0, with the addresses 10.77.0.1, 10.77.0.2 and so on.

    Their links are veth pairs to a bridge. With ``delay_ms`` or ``loss``, which count for each way between two hosts,
    they are what `bench/hosts/switch.py` passes on.
    """

    def __init__(self, hosts: int, delay_ms: float = 0.0, loss: float = 0.0) -> None:
        self._prefix = f"mgpu{os.getpid()}-{next(_NUMBERS)}"
        self._names = [f"{self._prefix}-{at}" for at in range(hosts)]
        self._switch = f"{self._prefix}-s"
        self._forwarder: subprocess.Popen[str] | None = None
        try:
            for name in (*self._names, self._switch):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            if delay_ms or loss:
                self._forward(delay_ms, loss)
            else:
                self._bridge()
            for at, name in enumerate(self._names):
                _ip("-n", name, "address", "add", f"{self.address(at)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def address(self, at: int) -> str:
        """Return the address of a host."""
        return f"10.77.0.{at + 1}"

    def command(self, at: int) -> list[str]:
        """Return what goes before a command that a host is to run."""
        rename = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", self._names[at], "unshare", "--uts", "sh", "-c", rename, f"host-{at}"]

    def cut(self, at: int) -> None:
        """Take the link of a host down. Connections stay open on both ends, and nothing passes."""
        self._set_link(at, "down")

    def mend(self, at: int) -> None:
        """Bring the link up again."""
        self._set_link(at, "up")

    def close(self) -> None:
        """Remove everything. Processes that still run there keep their namespace."""
        if self._forwarder is not None:
            assert self._forwarder.stdin is not None
            self._forwarder.stdin.close()
            self._forwarder.wait(_END_S)
        for name in (*self._names, self._switch):
            wait_until(partial(_is_gone, name), _END_S)

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_link(self, at: int, state: str) -> None:
        if self._forwarder is None:
            _ip("-n", self._switch, "link", "set", f"port{at}", state)
        else:
            _ip("-n", self._names[at], "link", "set", "eth0", state)

    def _bridge(self) -> None:
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for at, name in enumerate(self._names):
            port = f"port{at}"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")

    def _forward(self, delay_ms: float, loss: float) -> None:
        pairs = [word for at, name in enumerate(self._names) for word in (f"{self._prefix[:11]}-{at}", name)]
        rates = ["--delay-ms", str(delay_ms), "--loss", str(loss)]
        self._forwarder = subprocess.Popen(
            [sys.executable, "-m", "bench.hosts.switch", *rates, *pairs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._forwarder.stdout is not None
        if self._forwarder.stdout.readline() != "ready\n":
            raise NoNamespaces("TAP devices cannot be made here (/dev/net/tun)")


def _is_gone(name: str) -> bool:
    """Remove a namespace; return whether it is gone. It is busy for a moment after the last process in it has ended."""
    done = subprocess.run(["ip", "netns", "del", name], capture_output=True, text=True)
    return done.returncode == 0 or "No such file" in done.stderr


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(f"ip {' '.join(words)}: {done.stderr.strip()}")
