"""Turn a panic of the tokenizer library into an ordinary error.

The library is written in Rust. pyo3 raises a panic there as a `PanicException`, which derives from BaseException, so
`except Exception` lets it through and one prompt would end the gateway. Every call of the library goes through
`no_panics`. SystemExit and KeyboardInterrupt, which a signal raises in the middle of a call, pass.

The library also writes some lines to standard error for each panic, which is the log. From the first panic on, standard
error is closed to it: clients can cause thousands a second.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator

MAX_LOGGED = 16
"""Most different panics that are logged: clients choose the inputs, and must not fill the log."""
MAX_TEXT_CHARS = 200

log = logging.getLogger(__name__)
_logged: set[str] = set()


class Panic(Exception):
    """The library gave up. The text is for clients."""


@contextlib.contextmanager
def no_panics(what: str) -> Iterator[None]:
    """Raise Panic in place of a panic inside the block. ``what`` says what failed; each panic is logged once."""
    try:
        with _without_stderr() if _logged else contextlib.nullcontext():
            yield
    except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as panic:
        text = str(panic)[:MAX_TEXT_CHARS]
        if text not in _logged and len(_logged) < MAX_LOGGED:
            _logged.add(text)
            log.error("%s: the tokenizer library panicked: %s", what, text)
        raise Panic(f"{what}: the tokenizer library gave up") from None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    stderr = os.dup(2)
    os.dup2(_null(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@functools.cache
def _null() -> int:
    return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
