"""Text of a model on a terminal."""

import sys

_OBEYED = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""Control characters, of which a terminal obeys sequences: they move the cursor, set its title or its clipboard."""


def shown(text: str) -> str:
    """Return text that a terminal only shows; a file or pipe gets all of it."""
    return text.translate(_OBEYED) if sys.stdout.isatty() else text
