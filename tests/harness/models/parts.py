"""Change fields of a message or a configuration without saying in which of its parts they are."""

from dataclasses import fields, is_dataclass, replace
from typing import TypeVar

T = TypeVar("T")


def with_changes(whole: T, **changes: object) -> T:
    """Replace fields of a dataclass and of the dataclasses in it, by name. TypeError for an unknown name."""
    assert is_dataclass(whole)
    assert not isinstance(whole, type)
    own = {each.name for each in fields(whole)}
    found = {name: value for name, value in changes.items() if name in own}
    rest = {name: value for name, value in changes.items() if name not in own}
    for each in fields(whole):
        part = getattr(whole, each.name)
        if is_dataclass(part) and not isinstance(part, type):
            inner = {name: rest.pop(name) for name in list(rest) if name in {one.name for one in fields(part)}}
            if inner:
                found[each.name] = replace(part, **inner)
    if rest:
        raise TypeError(f"{type(whole).__name__} and its parts have no {', '.join(rest)}")
    return replace(whole, **found)
