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
HeldQuant = Literal["none", "8", "4", "fp8", "fp4"]
"""What the q are: integers of 8 or 4 bits, e4m3, or e2m1; ``none``: the weight is dense."""

INT4_GROUP = 32
"""Inputs that share an int4 scale and offset with ``--quant 4``. Groups of 64 save a tenth of the bytes and cost small
models more quality (docs/quantization.md)."""
_WORDS_PER_BLOCK = 32


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
        blocks = -(-inputs // (self.inputs_per_word * _WORDS_PER_BLOCK))
        groups = self.groups(whole_inputs or inputs) if self.is_ordered else self.groups(inputs)
        scales = outputs // self.rows_sharing(parts) * groups * self.scale_bytes
        order = 4 * inputs * len(parts) if self.is_ordered else 0
        return outputs * (4 * _WORDS_PER_BLOCK * blocks + groups * self.zero_bytes) + scales + order

    @property
    def inputs_per_word(self) -> int:
        return 8 if self.quant in ("4", "fp4") else 4

    @property
    def splits_at(self) -> int:
        """The multiple of inputs at which the columns of ranks must begin; 1: anywhere."""
        return 1 if self.is_ordered else max(1, self.group)

    @property
    def name(self) -> str:
        """The format in words, for the start-up log."""
        if self.source:
            return self.source
        if self.quant == "4":
            return f"int4, groups of {self.group}"
        return {"none": "", "8": "int8", "fp8": "fp8 (e4m3)", "fp4": "fp4 (e2m1)"}[self.quant]


DENSE = WeightFormat()
_ASKED: dict[Quant, WeightFormat] = {
    "none": DENSE, "8": WeightFormat("8"), "4": WeightFormat("4", INT4_GROUP), "fp8": WeightFormat("fp8"),
}  # fmt: skip


def weight_format(quant: Quant) -> WeightFormat:
    """Return the format into which ``--quant`` brings the weights on every rank."""
    return _ASKED[quant]


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


def uniform(form: WeightFormat) -> LayerFormats:
    """Return the formats of a layer whose matrices are all held alike."""
    return LayerFormats(form, form, form, form, form, form)
