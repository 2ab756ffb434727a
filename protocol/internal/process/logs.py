"""The log of all processes of a server: one form, to standard error, from one level on.

The parent puts both choices into the environment, so that its children log alike.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import IO, Literal

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
LogFormat = Literal["auto", "text", "json", "journal"]
LEVEL_VARIABLE = "MGPU_LOG_LEVEL"
FORMAT_VARIABLE = "MGPU_LOG_FORMAT"
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
"""What journald calls the levels."""


def log_level(environ: Mapping[str, str] = os.environ) -> int:
    """Return the level from which on a process logs: that of the environment, which the parent has checked, or INFO."""
    level = logging.getLevelName((environ.get(LEVEL_VARIABLE) or "info").upper())
    return level if isinstance(level, int) else logging.INFO


def configure_logging(component: str, stream: IO[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Log to ``stream`` (standard error) as the environment asks. ``component`` names this process in every line."""
    chosen = environ.get(FORMAT_VARIABLE) or "auto"
    if chosen == "auto" and stream is None and _goes_to_journal(environ):
        chosen = "journal"
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_FORMATTERS.get(chosen, TextFormatter)(component))
    logging.basicConfig(level=log_level(environ), handlers=[handler])


def _goes_to_journal(environ: Mapping[str, str]) -> bool:
    """Return True if systemd has connected standard error to its journal, as JOURNAL_STREAM says."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or replaced by an object without a file
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class _Formatter(logging.Formatter):
    def __init__(self, component: str) -> None:
        super().__init__()
        self.component = component

    def text(self, record: logging.LogRecord) -> str:
        """Return the message, and the traceback if there is one."""
        text = record.getMessage()
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class TextFormatter(_Formatter):
    """For people: date, level, component, message. Further lines of a message stand as they are."""

    def format(self, record: logging.LogRecord) -> str:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{date} {record.levelname.lower()} {self.component}: {self.text(record)}"


class JsonFormatter(_Formatter):
    """For programs: an object per line. A record's ``fields`` become members of it."""

    def format(self, record: logging.LogRecord) -> str:
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{date}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "component": self.component,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class JournalFormatter(_Formatter):
    """For journald, which adds the date itself: every line begins with its priority, as sd-daemon(3) says."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        lines = f"{self.component}: {self.text(record)}".splitlines()
        return "\n".join(prefix + line for line in lines)


_FORMATTERS: dict[str, type[_Formatter]] = {"json": JsonFormatter, "journal": JournalFormatter}
