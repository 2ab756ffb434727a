"""Text from tokens: whole characters, and stop strings wherever the token boundaries are."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu.orchestrator.gateway.text.detokenizer import (
    Detokenizer,
    StopSearch,
    byte_level_bytes,
    byte_level_table,
    sentence_piece_bytes,
)


def first_complete(text: str, stops: list[str]) -> str:
    """Cut a text at the stop string that ends first; of those the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
)
def test_stop_strings_cut_the_same_place_however_the_text_is_split(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    search, shown, at = StopSearch(stops), "", 0
    for size in sizes * 30:
        shown += search.push(text[at : at + size])
        at += size
        assert text.startswith(shown)
    assert shown + search.flush() == first_complete(text, stops)
    shown = first_complete(text, stops)
    complete = [stop for stop in stops if text.startswith(shown + stop)]
    first_end = min((len(stop) for stop in complete), default=None)
    assert search.found == (None if first_end is None else text[len(shown) :][:first_end])


@given(st.text(max_size=40), st.lists(st.integers(1, 3), min_size=1, max_size=8))
def test_bytes_in_any_pieces_become_the_same_text_without_a_broken_character(text: str, sizes: list[int]) -> None:
    data, pieces, at = text.encode(), [], 0
    while at < len(data):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(data[at : at + size])
        at += size
    detokenizer = Detokenizer(lambda number: pieces[number])
    shown = [detokenizer.push(number) for number in range(len(pieces))]
    assert "".join(shown) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


def test_invalid_bytes_do_not_hold_back_the_text_after_them() -> None:
    detokenizer = Detokenizer(lambda number: bytes([number]))
    assert [detokenizer.push(byte) for byte in b"\xe2\x82a"] == ["", "", "\ufffda"]
    assert detokenizer.push(0xFF) == "\ufffd"


def test_the_first_tokens_are_exempt_from_stop_strings() -> None:
    detokenizer = Detokenizer(lambda number: bytes([number]), ["ab"], min_tokens=3)
    assert "".join(detokenizer.push(byte) for byte in b"abab") == "abab"  # the last b alone is no stop string
    assert not detokenizer.stopped
    assert "".join(detokenizer.push(byte) for byte in b"xab") == "x"
    assert detokenizer.stopped
    assert detokenizer.push(ord("z")) == detokenizer.flush() == ""


def test_a_token_costs_the_same_at_the_end_of_a_long_text() -> None:
    detokenizer = Detokenizer(lambda number: b"abc ", ["never"] * 16)

    def cpu_s(tokens: int) -> float:
        started = time.process_time()
        for _ in range(tokens):
            detokenizer.push(0)
        return time.process_time() - started

    first = cpu_s(5_000)
    cpu_s(100_000)
    assert cpu_s(5_000) < 10 * first + 0.05


def test_byte_level_alphabet_covers_every_byte() -> None:
    table = byte_level_table()
    assert sorted(table.values()) == list(range(256))
    assert byte_level_bytes("ĠhÃ©Ċ") == " hé\n".encode()
    assert byte_level_bytes("<|日本|>") == "<|日本|>".encode()


@pytest.mark.parametrize(
    ("piece", "data"), [("▁the", b" the"), ("<0x0A>", b"\n"), ("<0xE2>", b"\xe2"), ("<0xZZ>", b"<0xZZ>")]
)
def test_sentence_piece_tokens(piece: str, data: bytes) -> None:
    assert sentence_piece_bytes(piece) == data
