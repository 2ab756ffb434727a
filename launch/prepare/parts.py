"""Turn the options of `serve` into the parts that go on as a whole: layout options, timeouts, limits of clients."""

from dataclasses import fields
from typing import TypeVar

from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.values import ConfigError
from mgpu.protocol.internal.client_limits import MAX_WEIGHT, MIN_WEIGHT, ClientLimits

Part = TypeVar("Part")
_NOT_ASKED = (0, "", "auto")
"""Values of an option that mean: not asked. A part has None instead."""


def part_of(config: ServeConfig, kind: type[Part], **converted: object) -> Part:
    """Build one of the parts that go on as a whole. Its fields have the names of the options that they come from.

    Example: ``part_of(config, Timeouts)`` takes three of its fields from ``config`` and leaves the others at their
    defaults. ``converted`` holds fields whose type differs from the option's.
    """
    values: dict[str, object] = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if hasattr(config, each.name):
            value = getattr(config, each.name)
            values[each.name] = None if each.default is None and value in _NOT_ASKED else value
    return kind(**values | converted)


def client_limits(config: ServeConfig) -> ClientLimits:
    """Return the limits of ``config``. ConfigError when the weights cannot be read."""
    return part_of(config, ClientLimits, client_weights=parse_weights(config.client_weights))


def parse_weights(text: str) -> dict[str, float]:
    """Read ``NAME=WEIGHT,NAME=WEIGHT``. ConfigError says which pair is wrong and what is allowed."""
    weights: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in pair.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"--client-weights has {pair!r}; write NAME=WEIGHT with a weight from {MIN_WEIGHT:g} to "
                f'{MAX_WEIGHT:g}, such as "uid:1000=4,uid:1001=0.5"'
            )
        if name in weights:
            raise ConfigError(f"--client-weights names {name!r} twice")
        weights[name] = weight
    return weights
