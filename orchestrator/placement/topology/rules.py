"""What a topology file says, as data: rules in the order of the file."""

import re
from dataclasses import dataclass

from mgpu.protocol.model.quantization import Quant

DeviceNames = tuple[str, ...]
"""Devices that share layers, as the file writes them: ``cuda[1]``, ``cpu`` or ``cpu[0]``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry: where some layers or tensors go, and how they are quantized."""

    key: str
    line: int
    first_layer: int = 0
    end_layer: int = 0
    pattern: re.Pattern[str] | None = None
    """Searched in full tensor names; None: the rule is for layers."""
    devices: DeviceNames = ()
    """Empty: they stay where they are."""
    quant: Quant | None = None
    """None: they keep what else holds for them."""
    experts_on_cpu: bool = False
    """True: the experts of these layers are in the machine's memory, and computed by the processor."""

    @property
    def layers(self) -> range:
        return range(self.first_layer, self.end_layer)


@dataclass(frozen=True, slots=True)
class Topology:
    """A topology file that has been read. ``source`` is its path."""

    source: str
    rules: tuple[Rule, ...]

    @property
    def places(self) -> bool:
        """True if any rule names a device."""
        return any(rule.devices for rule in self.rules)

    @property
    def moves_experts(self) -> bool:
        """True if any rule puts experts on the CPU without their layers."""
        return any(rule.experts_on_cpu for rule in self.rules)

    @property
    def quantizes(self) -> bool:
        """True if any rule names a quantization."""
        return any(rule.quant is not None for rule in self.rules)

    @property
    def last_cpu_number(self) -> int:
        """The largest N of ``cpu[N]``; -1 if there is none."""
        names = (name for rule in self.rules for name in rule.devices)
        return max((int(name[4:-1]) for name in names if name.startswith("cpu[")), default=-1)

    def where(self, rule: Rule) -> str:
        """Return how an error names a rule."""
        return f"{self.source}, line {rule.line}, {rule.key}"
