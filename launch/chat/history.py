"""What the user typed in earlier chats, in a file that only this user can read."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

MAX_ENTRIES = 1000
MAX_ENTRY_CHARS = 10_000
"""Longer messages, such as pasted files, are not kept."""


def history_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return where the history is: in XDG_STATE_HOME, else in ~/.local/state; None without a home folder."""
    environ = os.environ if environ is None else environ
    state = environ.get("XDG_STATE_HOME", "")
    with contextlib.suppress(RuntimeError):
        folder = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
        return folder / "mgpu" / "chat_history"
    return None


class History:
    """A file of JSON strings, one a line, the oldest first. Where it cannot be read or written, nothing is kept."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def entries(self) -> list[str]:
        """Return the last entries; shorten a file that has become long."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        entries = [entry for line in lines if (entry := _entry(line))]
        if len(lines) > 2 * MAX_ENTRIES:
            self._rewrite(entries[-MAX_ENTRIES:])
        return entries[-MAX_ENTRIES:]

    def add(self, text: str) -> None:
        """Append an entry."""
        if len(text) > MAX_ENTRY_CHARS:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path, [text], os.O_APPEND)

    def _rewrite(self, entries: list[str]) -> None:
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            _write(partial, entries, os.O_TRUNC)
            partial.replace(self._path)


def _entry(line: str) -> str:
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, str) else ""
    return ""


def _write(path: Path, entries: list[str], flag: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o600)  # also if another program has made it
        file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
