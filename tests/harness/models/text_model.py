"""A random model that reads and writes text, for tests of whole servers that ask nothing of what it says.

A worker loads it four CPU seconds sooner than the real small model. A step takes some milliseconds, so a stream of a
few hundred tokens lasts long enough for a signal, or a kill, to come in its middle.
"""

from pathlib import Path

from bench.attack.small_model import write_tokenizer
from harness.models.random_model import write_random_model

VOCABULARY = 1024
LONGEST = 32_768
"""Tokens of a request. A stream that a test breaks may be this long: it never ends before, however slow the test is."""


def write_text_model(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Write the model with its tokenizer and chat template; it splits over 2 and 4 ranks."""
    write_tokenizer(folder, vocabulary)
    last = vocabulary - 1  # the default ids of both are single characters, which grammars may need
    return write_random_model(
        folder, vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=LONGEST, bos_token_id=last,
        eos_token_id=last,
    )  # fmt: skip
