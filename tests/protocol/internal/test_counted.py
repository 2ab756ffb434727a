"""Numbers with their nouns."""

from mgpu.protocol.internal.counted import counted


def test_one_has_no_plural() -> None:
    assert [counted(count, "prompt token") for count in (0, 1, 2)] == [
        "0 prompt tokens",
        "1 prompt token",
        "2 prompt tokens",
    ]
