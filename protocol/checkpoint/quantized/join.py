"""Join the tensors of which a quantized matrix consists to one, under the name that the dense matrix would have.

Example: GPTQ stores `q_proj.qweight` I32 [K / 8, N], `.qzeros` I32 [G, N / 8], `.scales` F16 [G, N] and `.g_idx` I32
[K]. They become `q_proj.weight` [N, K] with these as its parts. All shapes are checked here, before anything is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import PackedParts, TensorEntry
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.quantized.config import WAY_OUT, Scheme, SchemeOf
from mgpu.protocol.model.weight_format import WeightFormat

_VALUES = {"rows": "weight", "words": "weight_packed", "gptq": "qweight", "awq": "qweight"}
_PACKED_TYPES = {"weight": ("F8_E4M3", "F8_E5M2", "I8", "U8"), "weight_packed": ("I32",), "qweight": ("I32",)}
_COMPANIONS = (
    "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape", "scales", "qzeros",
    "g_idx",
)  # fmt: skip
_SCALE_TYPES = {"F16": 2, "BF16": 2, "F32": 4, "F8_E8M0": 1}


def join_packed(tensors: Mapping[str, TensorEntry], scheme_of: SchemeOf) -> dict[str, TensorEntry]:
    """Return all tensors, the parts of packed matrices joined. CheckpointError for parts that do not fit."""
    found, used = dict(tensors), set[str]()
    for name, entry in tensors.items():
        module, _, last = name.rpartition(".")
        if entry.dtype not in _PACKED_TYPES.get(last, ()):
            continue
        scheme = scheme_of(module)
        if scheme is None:
            raise _error(
                entry, f"is stored as {entry.dtype}, and no quantization_config in config.json says how; plain types "
                "are F64, F32, F16, BF16"
            )  # fmt: skip
        if _VALUES[scheme.packing] != last:
            raise _error(entry, f"is not what {scheme.method} stores, which quantization_config names")
        weight = f"{module}.weight"
        if weight != name and weight in tensors:
            raise _error(entry, f"is packed, and {weight!r} in {tensors[weight].file} is the same matrix")
        companions = {end: tensors[f"{module}.{end}"] for end in _COMPANIONS if f"{module}.{end}" in tensors}
        found[weight] = _Joiner(scheme, entry, companions).joined(weight)
        used |= {f"{module}.{end}" for end in companions} | ({name} - {weight})
    return {name: entry for name, entry in found.items() if name not in used}


def _error(entry: TensorEntry, problem: str) -> CheckpointError:
    return CheckpointError(f"{entry.file}: tensor {entry.name!r} {problem}. Download the folder again, or {WAY_OUT}")


class _Joiner:
    """One packed matrix with its companions."""

    def __init__(self, scheme: Scheme, values: TensorEntry, companions: Mapping[str, TensorEntry]) -> None:
        self._scheme, self._values, self._companions = scheme, values, companions
        self._per_word = 32 // scheme.bits
        if len(values.shape) != 2:
            raise _error(values, f"has shape {list(values.shape)}; a matrix was expected")
        rows, columns = values.shape
        self._outputs, self._inputs = {
            "rows": (rows, columns),
            "words": (rows, columns * self._per_word),
            "gptq": (columns, rows * self._per_word),
            "awq": (columns * self._per_word, rows),
        }[scheme.packing]

    def joined(self, name: str) -> TensorEntry:
        scheme = self._scheme
        if scheme.packing == "rows" and self._values.dtype != ("F8_E4M3" if scheme.is_float else "I8"):
            raise _error(self._values, f"is stored as {self._values.dtype}, which is not what its scheme says")
        scales, rows, group = self._scales()
        groups = -(-self._inputs // group) if group else 1
        zeros = self._zeros(groups)
        order = self._order()
        is_single = groups == 1 and scheme.bits == 8 and zeros is None  # held as float32, one per output
        is_widened = is_single or (scheme.is_float and rows > 1)  # products of FP8 blocks take float32
        form = WeightFormat(
            quant="fp8" if scheme.is_float else "8" if scheme.bits == 8 else "4",
            group=group if groups > 1 else 0,
            rows=1 if is_single else rows,
            scale_bytes=4 if is_widened else _SCALE_TYPES[scales.dtype],
            zero_bytes=0 if zeros is None else 1 if scheme.bits == 4 else 2,
            is_ordered=order is not None and scheme.is_ordered and groups > 1,
            source=self._source(group if groups > 1 else 0, rows),
        )
        parts = PackedParts(
            form, scheme.packing, scheme.bits, self._values, scales, zeros, order, rows, scheme.zero_bias
        )
        nbytes = sum(entry.nbytes for entry in parts.entries)
        shape = self._outputs, self._inputs
        return replace(self._values, name=name, dtype=scheme.method, shape=shape, nbytes=nbytes, packed=parts)

    def _source(self, group: int, rows: int) -> str:
        scheme = self._scheme
        kind = "FP8" if scheme.is_float else f"int{scheme.bits}"
        name = kind if scheme.method == kind else f"{scheme.method} {kind}"
        if rows > 1:
            return f"{name}, blocks of {rows} x {group or self._inputs}"
        ordered = " in act-order" if scheme.is_ordered and group else ""
        return f"{name}, groups of {group}{ordered}" if group else f"{name}, a scale per output"

    def _scales(self) -> tuple[TensorEntry, int, int]:
        """Return the scales, how many outputs share one, and how many inputs; 0 inputs stand for all."""
        scheme, outputs = self._scheme, self._outputs
        names = ("scales",) if scheme.packing in ("gptq", "awq") else ("weight_scale", "weight_scale_inv")
        scales = next((self._companions[name] for name in names if name in self._companions), None)
        if scales is None:
            raise _error(self._values, f"has no {' or '.join(names)} beside it")
        if scales.dtype not in _SCALE_TYPES:
            raise _error(scales, f"is stored as {scales.dtype}; scales are {', '.join(_SCALE_TYPES)}")
        if scheme.block is not None:
            rows, columns = scheme.block
            expected: list[tuple[int, ...]] = [(-(-outputs // rows), -(-self._inputs // columns))]
            group = columns if columns < self._inputs else 0
        elif scheme.group and scheme.group < self._inputs:
            rows, group = 1, scheme.group
            if self._inputs % group:
                raise _error(self._values, f"has {self._inputs} inputs, which are no whole groups of {group}")
            groups = self._inputs // group
            expected = [(groups, outputs) if scheme.packing in ("gptq", "awq") else (outputs, groups)]
        else:
            rows, group = 1, 0
            expected = [(1, outputs)] if scheme.packing in ("gptq", "awq") else [(outputs, 1), (outputs,), (1,), ()]
            expected += [(1, 1)] if scheme.packing == "rows" else []
        if scales.shape not in expected:
            wanted = " or ".join(str(list(shape)) for shape in expected)
            raise _error(
                scales, f"has shape {list(scales.shape)}; for {outputs} x {self._inputs} weights {wanted} was expected"
            )
        return scales, rows, group

    def _zeros(self, groups: int) -> TensorEntry | None:
        """Return the zero points. Those that are stored count, even if the configuration calls the format symmetric."""
        outputs, words = self._outputs, -(-self._outputs // self._per_word)
        name, kind, expected = "weight_zero_point", "I32", [(words, groups)]
        if self._scheme.packing == "rows":
            kind, expected = "I8", [(outputs, groups)]
        elif self._scheme.packing != "words":
            name, expected = "qzeros", [(groups, words)]
        zeros = self._companions.get(name)
        if zeros is None and self._scheme.has_zeros:
            raise _error(self._values, f"has no {name} beside it")
        if zeros is None or self._scheme.is_float:  # e4m3 has no zero points; old files store zeros
            return None
        self._check(zeros, (kind,), expected)
        return zeros

    def _order(self) -> TensorEntry | None:
        """Return the group of each input. Files have it also where the groups are in order, and it is checked then."""
        name = "g_idx" if self._scheme.packing == "gptq" else "weight_g_idx"
        order = self._companions.get(name)
        if order is None:
            if self._scheme.is_ordered and self._scheme.group:
                raise _error(self._values, f"has no {name} beside it, which act-order needs")
            return None
        self._check(order, ("I32", "I64"), [(self._inputs,)])
        return order

    def _check(self, entry: TensorEntry, kinds: tuple[str, ...], expected: Sequence[tuple[int, ...]]) -> None:
        if entry.dtype not in kinds or entry.shape not in expected:
            wanted = " or ".join(str(list(shape)) for shape in expected)
            raise _error(
                entry, f"is {entry.dtype} {list(entry.shape)}; {' or '.join(kinds)} {wanted} was expected for "
                f"{self._outputs} x {self._inputs} weights"
            )  # fmt: skip
