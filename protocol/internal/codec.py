"""Turn frozen dataclasses into MessagePack bytes and back, positionally and with checked types.

For mgpu's own processes, which always run the same version. A message is ``[tag, field, field, …]``, nested
dataclasses are lists of their fields, tuples and lists are arrays. The public front channel uses named maps
instead (front/client_messages.py), since other languages speak it.
"""

import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

import msgpack


class CodecError(ValueError):
    """The bytes are not a message of the expected kind."""


Decoder = Callable[[object], Any]


def _fields_of(value: object) -> list[object]:
    """Return the list that msgpack packs for a dataclass; msgpack calls this for every type that it does not know."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} cannot be part of a message")
    return [getattr(value, name) for name in _field_names(type(value))]


@cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


@cache
def _decoder_of(hint: Any) -> Decoder:
    """Return the function that checks and converts one field. Cached, so that hints are resolved once."""
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _dataclass_decoder(hint)
    if origin in (Union, types.UnionType):
        return _optional_decoder(args)
    if origin is Literal:
        return lambda value: value if value in args else _refuse(value, hint)
    if origin in (list, tuple):
        return _sequence_decoder(origin, args)
    if origin is dict:
        key, item = _decoder_of(args[0]), _decoder_of(args[1])
        return lambda value: (
            {key(k): item(v) for k, v in value.items()} if isinstance(value, dict) else _refuse(value, hint)
        )
    if hint is float:
        return lambda value: float(value) if isinstance(value, (int, float)) else _refuse(value, hint)
    return lambda value: value if isinstance(value, hint) else _refuse(value, hint)


def _optional_decoder(args: tuple[Any, ...]) -> Decoder:
    present = [arg for arg in args if arg is not type(None)]
    if len(present) != 1:
        raise TypeError("only `X | None` unions can be decoded")
    inner = _decoder_of(present[0])
    return lambda value: None if value is None else inner(value)


def _sequence_decoder(kind: type, args: tuple[Any, ...]) -> Decoder:
    if kind is tuple and Ellipsis not in args:
        parts = [_decoder_of(arg) for arg in args]
        return lambda value: tuple(part(item) for part, item in zip(parts, _list(value), strict=True))
    item_type = args[0]
    if item_type in (int, str, bytes) and kind is list:
        # The hot columns of a step plan: one pass in C instead of a call per element.
        return lambda value: (
            value
            if isinstance(value, list) and all(map(item_type.__instancecheck__, value))
            else _refuse(value, f"list of {item_type.__name__}")
        )
    item_decoder = _decoder_of(item_type)
    return lambda value: kind(map(item_decoder, _list(value)))


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else _refuse(value, list)


def _dataclass_decoder(cls: Any) -> Decoder:
    hints = typing.get_type_hints(cls)
    decoders = [_decoder_of(hints[name]) for name in _field_names(cls)]

    def decode(value: object) -> object:
        items = _list(value)
        if len(items) != len(decoders):
            raise CodecError(f"{cls.__name__} has {len(decoders)} fields, got {len(items)}")
        return cls(*[decoder(item) for decoder, item in zip(decoders, items, strict=True)])

    return decode


def _refuse(value: object, hint: Any) -> Any:
    raise CodecError(f"expected {hint}, got {type(value).__name__}")


class Codec:
    """Encode and decode a closed set of dataclasses. A message's tag is the position of its class in ``classes``."""

    def __init__(self, *classes: type) -> None:
        self._classes = classes
        self._tags = {cls: tag for tag, cls in enumerate(classes)}

    def encode(self, message: object) -> bytes:
        """Pack one message. KeyError when its class is not part of this codec."""
        body = [self._tags[type(message)], *_fields_of(message)]
        packed: bytes = msgpack.packb(body, default=_fields_of, use_bin_type=True)
        return packed

    def decode(self, data: bytes) -> Any:
        """Unpack one message of any of the classes. CodecError for anything else."""
        try:
            items = msgpack.unpackb(data, raw=False, strict_map_key=False)
            return _decoder_of(self._classes[items[0]])(items[1:])
        except CodecError:
            raise
        except Exception as error:  # msgpack and the indexing raise many unrelated classes for malformed bytes
            raise CodecError(f"malformed message: {error}") from error
