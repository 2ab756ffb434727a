"""Read `quantization_config` of a config.json: how the matrices of a checkpoint are quantized.

What is stored decides which matrices are quantized. The configuration says how to read those that are.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError, Fields

METHODS = "fp8, fbgemm_fp8, compressed-tensors, gptq, awq, and mxfp4 of gpt-oss"
WAY_OUT = "use the original weights with --quant 8, 4 or fp8, or a GGUF file"
_MOST_GROUPS = 64
_MOST_PATTERN = 300
_MOST_REPEATS = 3
"""Repetitions of a pattern. With more, or with nested ones, matching a name could take forever."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is quantized."""

    method: str
    packing: Literal["rows", "words", "gptq", "awq"]
    bits: int
    is_float: bool = False
    group: int = 0
    """Inputs that share a scale; 0: all, or ``block`` says."""
    block: tuple[int, int] | None = None
    """Outputs and inputs that share a scale."""
    has_zeros: bool = False
    is_ordered: bool = False
    zero_bias: int = 0


SchemeOf = Callable[[str], Scheme | None]
"""Returns the scheme of a module by its name in the files; None if the configuration names none for it."""


def read_schemes(config: Fields) -> SchemeOf:
    """Return how modules are quantized. CheckpointError for a method or a version that cannot be read."""
    quantization = config.nested("quantization_config")
    if quantization is None:
        return lambda module: None
    method = quantization.text("quant_method", "unknown")
    readers: dict[str, Callable[[Fields], SchemeOf]] = {
        "fp8": _float8, "fbgemm_fp8": _float8, "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq,
    }  # fmt: skip
    if method not in readers:
        raise refusal(config)
    return readers[method](quantization)


def refusal(config: Fields) -> CheckpointError:
    """Return the error for a quantization that cannot be served, with the way out."""
    quantization = config.nested("quantization_config")
    method = "unknown" if quantization is None else quantization.text("quant_method", "unknown")
    if method == "bitsandbytes":
        why = "which only the library bitsandbytes can read"
    else:
        why = f"which is not supported; supported: {METHODS}"
    return CheckpointError(
        f"{config.source}: the checkpoint is already quantized ({method[:40]}), {why}. Instead {WAY_OUT}"
    )


def _float8(fields: Fields) -> SchemeOf:
    if (kind := fields.text("fmt", "e4m3")) not in ("e4m3", "float8_e4m3fn"):
        raise fields.error("fmt", f"is {kind[:40]!r}; supported: e4m3")
    scheme = Scheme("FP8", "rows", 8, is_float=True, block=_block(fields, "weight_block_size"))
    return lambda module: scheme


def _block(fields: Fields, key: str) -> tuple[int, int] | None:
    sizes = fields.list_of(key, int, 2)
    if sizes is None:
        return None
    rows, columns = (int(str(size)) for size in sizes)
    if not (1 <= rows <= 1 << 20 and 1 <= columns <= 1 << 20):
        raise fields.error(key, f"is {sizes}; both must be above 0")
    return rows, columns


def _gptq(fields: Fields) -> SchemeOf:
    version = fields.text("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2") or fields.boolean("is_marlin_format", False):
        raise fields.error("checkpoint_format", f"is {version[:40]!r}; supported: gptq, gptq_v2. Instead {WAY_OUT}")
    plain = Scheme("GPTQ", "gptq", 4, has_zeros=True, zero_bias=int(version == "gptq"))
    base = _with_gptq(plain, fields, needs_bits=True)
    overrides = fields.nested("dynamic")
    if overrides is None:
        return lambda module: base
    changed = [
        (
            _pattern(overrides, name.removeprefix("+:")),
            _with_gptq(base, overrides.nested(name) or Fields(overrides.source, {})),
        )
        for name in overrides.names(_MOST_GROUPS)
        if not name.startswith("-:")  # modules that are not quantized
    ]
    return lambda module: next((scheme for pattern, scheme in changed if pattern.match(module)), base)


def _with_gptq(base: Scheme, fields: Fields, needs_bits: bool = False) -> Scheme:
    bits = fields.integer("bits", None if needs_bits else base.bits)
    if bits not in (4, 8):
        raise fields.error("bits", f"is {bits}; supported: 4, 8. Instead {WAY_OUT}")
    group = _group_size(fields, base.group)
    return replace(base, bits=bits, group=group, is_ordered=fields.boolean("desc_act", base.is_ordered))


def _group_size(fields: Fields, default: int, key: str = "group_size") -> int:
    """Return the inputs of a group; 0 for all, which is written as -1."""
    group = fields.integer(key, default or -1, low=-1, high=1 << 20)
    if group == 0:
        raise fields.error(key, "is 0; expected -1, or a number of inputs")
    return max(0, group)


def _awq(fields: Fields) -> SchemeOf:
    version = fields.text("version", "gemm").lower()
    if version != "gemm":
        raise fields.error("version", f"is {version[:40]!r}; supported: gemm. Instead {WAY_OUT}")
    key = "bits" if fields.has("bits") else "w_bit"
    if (bits := fields.integer(key)) != 4:
        raise fields.error(key, f"is {bits}; supported: 4. Instead {WAY_OUT}")
    if not fields.boolean("zero_point", True):
        raise fields.error("zero_point", f"is false; supported: true. Instead {WAY_OUT}")
    key = "group_size" if fields.has("group_size") else "q_group_size"
    scheme = Scheme("AWQ", "awq", 4, group=_group_size(fields, 128, key), has_zeros=True)
    return lambda module: scheme


def _compressed(fields: Fields) -> SchemeOf:
    sparsity = fields.nested("sparsity_config")
    if sparsity is not None and sparsity.text("format", "dense") != "dense":
        raise sparsity.error("format", f"is {sparsity.text('format', '')[:40]!r}; supported: dense. Instead {WAY_OUT}")
    groups = fields.nested("config_groups")
    if groups is None:
        raise fields.error("config_groups", "is missing")
    by_name: list[tuple[Sequence[str | re.Pattern[str]], Scheme]] = []
    for name in groups.names(_MOST_GROUPS):
        group = groups.nested(name) or Fields(f"{groups.source}: {name}", {})
        targets = [str(target) for target in group.list_of("targets", str) or ["Linear"]]
        scheme = _compressed_scheme(group, group.text("format", fields.text("format", "")))
        by_name.append(([_target(group, target) for target in targets], scheme))

    def scheme_of(module: str) -> Scheme | None:
        for is_wanted in (lambda target: _names(target, module), lambda target: target == "Linear"):
            for targets, scheme in by_name:
                if any(map(is_wanted, targets)):
                    return scheme
        return None

    return scheme_of


def _target(fields: Fields, target: str) -> str | re.Pattern[str]:
    return _pattern(fields, target[3:]) if target.startswith("re:") else target


def _names(target: str | re.Pattern[str], module: str) -> bool:
    return target == module if isinstance(target, str) else target.match(module) is not None


def _pattern(fields: Fields, text: str) -> re.Pattern[str]:
    """Compile a stranger's pattern, if no name can make it run for long."""
    repeats = len(re.findall(r"(?<!\\)[*+{]", text))
    if len(text) > _MOST_PATTERN or repeats > _MOST_REPEATS or re.search(r"\)[*+{]", text):
        raise CheckpointError(f"{fields.source}: the pattern {text[:60]!r} is too intricate")
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{fields.source}: the pattern {text[:60]!r} is not valid: {error}") from error


def _compressed_scheme(group: Fields, form: str) -> Scheme:
    weights = group.nested("weights")
    if weights is None:
        raise group.error("weights", "is missing")
    bits, kind = weights.integer("num_bits"), weights.text("type", "int")
    strategy = weights.text("strategy", "tensor")
    symmetric = weights.boolean("symmetric", True)
    is_packed = form == "pack-quantized"
    known = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    if form not in known or (kind, bits, is_packed) not in (
        ("int", 4, True), ("int", 8, True), ("int", 8, False), ("float", 8, False),
    ):  # fmt: skip
        raise weights.error(
            "type", f"is {kind[:20]!r} of {bits} bits as {form[:40]!r}; supported: int of 4 and 8 bits, float of 8, as "
            f"{', '.join(known)}. Instead {WAY_OUT}"
        )  # fmt: skip
    if strategy not in ("tensor", "channel", "group", "block"):
        raise weights.error(
            "strategy", f"is {strategy[:40]!r}; supported: tensor, channel, group, block. Instead {WAY_OUT}"
        )
    block = _block(weights, "block_structure") if strategy == "block" else None
    if strategy == "block" and block is None:
        raise weights.error("block_structure", "is missing")
    return Scheme(
        "FP8" if kind == "float" else "compressed-tensors",
        "words" if is_packed else "rows",
        bits,
        kind == "float",
        _group_size(weights, 0) if strategy == "group" else 0,
        block,
        has_zeros=not symmetric,
        is_ordered=weights.raw("actorder") in ("group", True),
    )
