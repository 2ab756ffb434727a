"""How a rank holds the weight of a linear layer: dense, or packed in one of several formats. And in how many bytes.

Planner, readers and workers share this. A packed weight [outputs, inputs] is ``(q - zero) * scale``: q are 4 or 8 bits
each, and ``group`` inputs of ``rows`` outputs have one scale (and zero). ``worker/quantization/packing.py`` has the
layout of the words.
"""

import math
from dataclasses import dataclass
from typing import Literal

Quant = Literal["none", "8", "4", "fp8"]
"""The values of ``--quant``: nothing, int8, group-wise int4, or float8 (e4m3)."""
HeldQuant = Literal["none", "8", "4", "fp8", "fp4", "nl4", "6", "5", "3", "2"]
"""What the q are: integers of so many bits, e4m3, e2m1, or 16 values that are not evenly spaced (``nl4``, of GGUF);
``none``: the weight is dense."""
_BITS: dict[HeldQuant, int] = {"8": 8, "fp8": 8, "4": 4, "fp4": 4, "nl4": 4, "6": 6, "5": 5, "3": 3, "2": 2}

INT4_GROUP = 32
"""Inputs that share an int4 scale and offset with ``--quant 4``. Groups of 64 save a tenth of the bytes and cost small
models more quality (docs/quantization.md)."""
_WORDS_PER_BLOCK = 32
_SUPER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The format of one rank's weight of a linear layer."""

    quant: HeldQuant = "none"
    group: int = 0
    """Inputs that share a scale; 0: all of an output."""
    rows: int = 1
    """Outputs that share a scale, where slices begin and end at their borders."""
    scale_bytes: int = 4
    """Of a scale. With ``--quant 4``, of a scale and an offset in bfloat16."""
    zero_bytes: int = 0
    """Of a zero point; 0: there are none."""
    is_ordered: bool = False
    """True if any input may be in any group (GPTQ's act-order): which one it is in is stored for each."""
    source: str = ""
    """The checkpoint's own name of the format; empty: the worker quantizes dense weights while it loads them."""
    offset_bytes: int = 0
    """Of what is added to the weights of a group after their scale; 0: nothing is."""
    super_bytes: int = 0
    """Of the numbers by which the scales (and offsets) of 256 inputs are multiplied: GGUF's K-quants."""
    block: int = 0
    """Inputs of a block of a GGUF file; 0: the format is another file's."""

    def rows_sharing(self, parts: tuple[int, ...]) -> int:
        """Return the outputs that share a scale in a stack of matrices of so many rows each."""
        return math.gcd(self.rows, *parts)

    def groups(self, inputs: int) -> int:
        """Return the scales of an output."""
        return -(-inputs // self.group) if self.group else 1

    def matrix_bytes(
        self, outputs: int, inputs: int, dtype_bytes: int, parts: tuple[int, ...] = (), whole_inputs: int = 0
    ) -> int:
        """Return the bytes of a matrix: ``dtype_bytes`` per weight if it is dense, else padded words and scales.

        ``parts``: the outputs of each matrix, if several are stacked. ``whole_inputs``: the inputs of the matrix of
        which this one is a range of columns. Its columns may then belong to any of its groups.
        """
        if self.quant == "none":
            return outputs * inputs * dtype_bytes
        parts = parts or (outputs,)
        padded = -(-inputs // self.padding) * self.padding
        groups = self.groups(whole_inputs or inputs) if self.is_ordered else self.groups(inputs)
        scales = outputs // self.rows_sharing(parts) * groups * self.scale_bytes
        order = 4 * inputs * len(parts) if self.is_ordered else 0
        supers = -(-inputs // _SUPER_BLOCK) * self.super_bytes
        by_group = groups * (self.zero_bytes + self.offset_bytes)
        return outputs * (padded * _BITS[self.quant] // 8 + by_group + supers) + scales + order

    @property
    def padding(self) -> int:
        """The multiple of inputs to which a row is filled up. Blocks of GGUF are whole runs of 32."""
        if self.block and _BITS[self.quant] < 8:
            return 32
        return _WORDS_PER_BLOCK * (4 if _BITS[self.quant] == 8 else 8)

    @property
    def splits_at(self) -> int:
        """The multiple of inputs at which the columns of ranks must begin; 1: anywhere."""
        return 1 if self.is_ordered else max(1, self.group, self.block)

    @property
    def name(self) -> str:
        """The format in words, for the start-up log."""
        if self.source:
            return self.source
        if self.quant == "4":
            return f"int4, groups of {self.group}"
        return {"8": "int8", "fp8": "fp8 (e4m3)"}.get(self.quant, "")


DENSE = WeightFormat()
_ASKED: dict[Quant, WeightFormat] = {
    "none": DENSE, "8": WeightFormat("8"), "4": WeightFormat("4", INT4_GROUP), "fp8": WeightFormat("fp8"),
}  # fmt: skip


def weight_format(quant: Quant) -> WeightFormat:
    """Return the format into which ``--quant`` brings the weights on every rank."""
    return _ASKED[quant]


HELD = ("qkv", "out", "gate_up", "down", "shared_gate_up", "shared_down", "q_b")
"""What a layer holds in one matrix each."""


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """The formats of the matrices of one decoder layer. Those of experts are stacked, and alike."""

    qkv: WeightFormat = DENSE
    out: WeightFormat = DENSE
    gate_up: WeightFormat = DENSE
    down: WeightFormat = DENSE
    shared_gate_up: WeightFormat = DENSE
    """Of the network that all tokens go through beside the experts."""
    shared_down: WeightFormat = DENSE
    qkv_parts: tuple[WeightFormat, ...] = ()
    """The formats of q, k and v if they differ: then each is held by itself."""
    gate_up_parts: tuple[WeightFormat, ...] = ()
    q_b: WeightFormat = DENSE
    """Of the second projection of queries in latent attention."""

    def parts_of(self, held: str) -> tuple[WeightFormat, ...]:
        """Return the formats of stacked matrices that are not all alike; none if they are."""
        parts: tuple[WeightFormat, ...] = getattr(self, f"{held}_parts", ())
        return parts

    def formats_of(self, held: str) -> tuple[WeightFormat, ...]:
        """Return all formats of what is called ``held``."""
        return self.parts_of(held) or (getattr(self, held),)


def uniform(form: WeightFormat) -> LayerFormats:
    """Return the formats of a layer whose matrices are all held alike."""
    return LayerFormats(form, form, form, form, form, form, q_b=form)
