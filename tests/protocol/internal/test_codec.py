"""Messages between our own processes, by position: whatever does not fit is one kind of error."""

from dataclasses import dataclass

import msgpack
import pytest

from mgpu.protocol.internal.codec import Codec, CodecError
from mgpu.protocol.internal.worker_messages import LogitBias, RowSampling


@dataclass(frozen=True, slots=True)
class Inner:
    a: int
    b: str


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    pair: tuple[int, float]
    more: list[Inner]
    names: list[str]
    note: str | None = None


CODEC = Codec(Outer, Inner)
MESSAGE = Outer(Inner(1, "x"), (2, 0.5), [Inner(3, "y")], ["z"])


def test_a_message_survives() -> None:
    assert CODEC.decode(CODEC.encode(MESSAGE)) == MESSAGE
    assert CODEC.decode(CODEC.encode(Inner(5, ""))) == Inner(5, "")


GOOD = [[1, "x"], [2, 0.5], [[3, "y"]], ["z"], None]


@pytest.mark.parametrize(("fields", "words"), [
    (GOOD[:4], "Outer has 5 fields, got 4"),
    ([*GOOD, 7], "Outer has 5 fields, got 6"),
    ([[1], *GOOD[1:]], "Inner has 2 fields, got 1"),
    ([*GOOD[:2], [[3, "y", "z"]], *GOOD[3:]], "Inner has 2 fields, got 3"),
    ([1, *GOOD[1:]], "expected .*list.*, got int"),
    ([["1", "x"], *GOOD[1:]], "expected .*int.*, got str"),
    ([*GOOD[:3], [1], None], "expected list of str, got list"),
])  # fmt: skip
def test_fields_that_do_not_fit_are_named(fields: list[object], words: str) -> None:
    tag_and_fields = msgpack.unpackb(CODEC.encode(MESSAGE))
    good = msgpack.packb(_replaced(tag_and_fields, fields))
    with pytest.raises(CodecError, match=words):
        CODEC.decode(good)


def _replaced(message: object, fields: list[object]) -> object:
    """Put other fields in the place of those of `MESSAGE`, wherever the framing has them."""
    if message == GOOD:
        return fields
    assert isinstance(message, list)
    if message[1:] == GOOD:
        return [message[0], *fields]
    return [_replaced(each, fields) if isinstance(each, list) else each for each in message]


@dataclass(frozen=True, slots=True)
class Table:
    rows: list[tuple[int, float]]
    names: list[tuple[int, str]] | None = None


TABLE = Codec(Table)


@pytest.mark.parametrize("message", [Table([]), Table([(1, 0.5)]), Table([(1, 2.0), (3, 4.5)], [(5, "x")])])
def test_a_table_survives_with_its_types(message: Table) -> None:
    found = TABLE.decode(TABLE.encode(message))
    assert found == message
    assert all(type(value) is float for _, value in TABLE.decode(msgpack.packb([0, [[1, 2]], None])).rows)


NO_TABLES = [
    [[1]],
    [[1, 2.0, 3.0]],
    [["x", 1.0]],
    [[1, "x"]],
    [1],
    ["ab"],
    "ab",
    [[1, 2.0], [3]],
    [[]],
    {},
    [[1, None]],
]


@pytest.mark.parametrize("rows", NO_TABLES, ids=str)
def test_what_is_no_table_is_refused(rows: object) -> None:
    with pytest.raises(CodecError):
        TABLE.decode(msgpack.packb([0, rows, None]))


def test_a_thousand_biases_are_decoded_as_two_fields_of_bytes() -> None:
    """Not as a tuple and two numbers each: a request may have 128 choices, and a client many requests."""
    codec = Codec(RowSampling)
    bias = LogitBias.of([(token_id, -0.5) for token_id in range(1024)])
    found = codec.decode(codec.encode(RowSampling(logit_bias=bias))).logit_bias
    assert found == bias
    assert (type(found.token_ids), len(found.token_ids), len(found.values)) == (bytes, 4096, 4096)
