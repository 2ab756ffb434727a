"""Turn a panic of the tokenizer library into an ordinary error.

The library is written in Rust. pyo3 raises a panic there as a `PanicException`, which derives from BaseException, so
`except Exception` lets it through and one prompt would end the gateway. Every call of the library goes through
`no_panics`. SystemExit and KeyboardInterrupt, which a signal raises in the middle of a call, pass.
"""

import contextlib
import logging
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
        yield
    except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as panic:
        text = str(panic)[:MAX_TEXT_CHARS]
        if text not in _logged and len(_logged) < MAX_LOGGED:
            _logged.add(text)
            log.error("%s: the tokenizer library panicked: %s", what, text)
        raise Panic(f"{what}: the tokenizer library gave up") from None
