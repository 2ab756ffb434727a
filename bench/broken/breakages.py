"""What is broken in a tiny model: one thing at a time, each with whether it must be refused."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.broken.models import DOWN, GGUF_DOWN, GROUP, Model, Tensor, bytes_of
from mgpu.protocol.checkpoint.files.gguf_file import GGUF_TYPES
from mgpu.protocol.checkpoint.files.safetensors_file import DTYPE_BYTES

_RARE = (
    "ssm_", "attn_qkv", "attn_gate", "attn_k_b", "attn_v_b", "attn_kv_a", "exp_probs_b", "inp_gate",
    "per_layer_model_proj", "gate_exps",
)  # fmt: skip
"""Parts of the names of tensors in GGUF files of few families."""
HOSTILE: tuple[object, ...] = (
    None, -1, 0, 1, 3, 1 << 40, 1.5, float("nan"), True, False, "", "marlin", [], [0, 0], [-1, 64], [1 << 40, 1], {},
    {"a": 1}, "tensor", "group", "float",
)  # fmt: skip
"""What a key of a configuration may hold instead."""
_GGUF_HOSTILE: tuple[object, ...] = (None, -1, 0, 1, 3, 1 << 31, 1 << 60, 1.5, float("nan"), True, "", "x", [], [1, 2])
_FREE_TYPES = {"scale": ("F16", "BF16", "F32", "F8_E8M0"), "g_idx": ("I32", "I64"), "weight_shape": tuple(DTYPE_BYTES)}
"""Types that a part of a matrix may have as well, by a part of its name."""


@dataclass(frozen=True)
class Breakage:
    """``change`` breaks a model in memory, ``spoil`` its files afterwards."""

    name: str
    is_fatal: bool
    """True if it must be refused; else it is refused, or loaded whole."""
    tensor: str = ""
    """What the refusal must name."""
    change: Callable[[Model], Model] = lambda model: model
    spoil: Callable[[Path], None] = lambda folder: None


def breakages(model: Model) -> Iterator[Breakage]:
    """Yield everything that is done to a model."""
    for name, tensor in model.tensors.items():
        if _is_broken_too(model, name):
            yield from _of_header(model, name, tensor)
            yield from _of_data(model, name, tensor)
    yield from _of_files(model)
    yield from _of_metadata(model) if model.is_gguf else _of_config(model)


def _is_broken_too(model: Model, name: str) -> bool:
    """Return True for the parts of one matrix, the experts, what few families have, and what is not in a layer."""
    if model.is_gguf and any(part in name for part in _RARE):
        return True
    chosen = (
        (GGUF_DOWN, "token_embd.weight", "output_norm.weight") if model.is_gguf else (DOWN, "model.norm.", ".experts.")
    )
    return name.startswith(chosen) or ".experts." in name


def _free_types(name: str) -> tuple[str, ...]:
    if name.endswith(("norm.weight", "bias")) or "embed" in name:
        return ("F64", "F32", "F16", "BF16")
    return next((types for part, types in _FREE_TYPES.items() if part in name), ())


def _of_header(model: Model, name: str, tensor: Tensor) -> Iterator[Breakage]:
    is_needed = not name.endswith(("weight_shape", "g_idx", "exp_probs_b.bias")) or (
        name.endswith("g_idx") and "act-order" in model.name
    )
    yield Breakage(f"{name} missing", is_needed, _stem(name), lambda model: model.with_tensor(name, None))
    shape = tensor.shape
    shapes = [
        *((*shape[:at], size, *shape[at + 1 :]) for at in range(len(shape)) for size in (
            shape[at] + 1, shape[at] - 1, 2 * shape[at], shape[at] // 2, 0, -1, 1 << 62)),
        (*shape, 1), (*shape, 2), (1, *shape), shape[:-1], shape[::-1],
    ]  # fmt: skip
    for other in dict.fromkeys(shapes):
        if other == shape or (model.is_gguf and not other):
            continue
        is_scale = "scale" in name and other in ((), (1,), (1, 1), (*shape, 1), (1, *shape))
        is_free = name.endswith("weight_shape") or is_scale or (shape == (*shape[:1], 1) and other == shape[:1])
        yield _replaced(f"{name} as {list(other)}", not is_free, name, tensor.dtype, other, tensor.data)
    kinds = GGUF_TYPES.values() if model.is_gguf else DTYPE_BYTES
    for dtype in kinds:
        if dtype == tensor.dtype:
            continue
        is_fatal = not model.is_gguf and dtype not in _free_types(name)
        yield _replaced(f"{name} as {dtype}", is_fatal, name, dtype, shape, tensor.data)
        size = bytes_of(dtype, shape)
        if model.is_gguf and abs(size - len(tensor.data)) >= GROUP:  # a type number that is not what is stored
            mislabelled = replace(tensor, dtype=dtype)
            yield Breakage(f"{name} called {dtype}", True, _stem(name), _put(name, mislabelled))
    for number in (4, 5, 9, 15, 16, 19, 24, 36, 40, 41, 255, 1 << 31) if model.is_gguf else ():
        mislabelled = replace(tensor, dtype=f"type {number}")
        yield Breakage(f"{name} of type number {number}", True, _stem(name), _put(name, mislabelled))


def _put(name: str, tensor: Tensor) -> Callable[[Model], Model]:
    return lambda model: model.with_tensor(name, tensor)


def _stem(name: str) -> str:
    """Return what a refusal names of a tensor: matrices of GGUF files are known by their other names, too."""
    return name.removesuffix(".weight").rpartition(".")[0] if name.startswith("model.layers") else ""


def _replaced(what: str, is_fatal: bool, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Breakage:
    """Return the change to a tensor with as many bytes as its new header says."""
    size = bytes_of(dtype, shape) if min(shape, default=1) >= 0 and max(shape, default=1) < 1 << 20 else len(data)
    whole = (data * (size // max(1, len(data)) + 1))[:size]
    return Breakage(what, is_fatal, _stem(name), _put(name, Tensor(dtype, shape, whole)))


_BAD_NUMBERS = {
    "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"), "F16": (b"\0\x7e", b"\0\x7c", b"\0\xfc"),
    "BF16": (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"), "F8_E4M3": (b"\x7f", b"\xff"),
}  # fmt: skip
"""NaN and infinities."""
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where blocks of GGUF hold halves."""


def _of_data(model: Model, name: str, tensor: Tensor) -> Iterator[Breakage]:
    def spoiled(what: str, at: int, value: bytes) -> Breakage:
        data = tensor.data[:at] + value + tensor.data[at + len(value) :]
        return Breakage(f"{name} with {what} at {at}", True, _stem(name), _put(name, replace(tensor, data=data)))

    last = len(tensor.data)
    for value in _BAD_NUMBERS.get(tensor.dtype, ()):
        yield from (spoiled(value.hex(), at, value) for at in {0, last // 2 & -4, last - len(value)})
    for place in _HALVES.get(tensor.dtype, ()):
        block = bytes_of(tensor.dtype, (256,)) // (1 if tensor.dtype.endswith(("K", "XS")) else 8)
        for value in _BAD_NUMBERS["F16"]:
            yield from (spoiled(value.hex(), at, value) for at in (place, last - block + place))
    if "scale" in name and tensor.dtype in ("F32", "BF16"):  # finite, but no weight with it is
        yield spoiled("3e38", 0, b"\0\0\x60\x7f"[-4 if tensor.dtype == "F32" else -2 :])
    if tensor.dtype == "MXFP4" or name.endswith("_scales"):
        yield from (spoiled("ff", at, b"\xff") for at in ((0, last - 17) if tensor.dtype == "MXFP4" else (0, last - 1)))
    if name.endswith("g_idx"):
        for value in (-1, tensor.shape[0] // GROUP, 1 << 30, -(1 << 31)):
            yield from (spoiled(f"group {value}", at, struct.pack("<i", value)) for at in (0, last - 4))


def _of_files(model: Model) -> Iterator[Breakage]:
    end = ".gguf" if model.is_gguf else ".safetensors"

    def files(folder: Path) -> list[Path]:
        return sorted(folder.glob(f"*{end}"))

    def cut(count: int) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            data = files(folder)[-1].read_bytes()
            files(folder)[-1].write_bytes(data[: max(0, len(data) - count)])

        return spoil

    for count in (64, 200, 5000, 1 << 30):
        yield Breakage(f"the file cut by {count}", True, spoil=cut(count))

    def append(folder: Path) -> None:
        with open(files(folder)[-1], "ab") as file:
            file.write(bytes(4096))

    yield Breakage("4096 bytes too many", True, spoil=append)
    yield Breakage("the last file missing", True, spoil=lambda folder: files(folder)[-1].unlink())

    def twice(folder: Path) -> None:
        name = f"m-00003-of-00003{end}" if model.is_gguf else f"model-00002-of-00002{end}"
        (folder / name).write_bytes(files(folder)[-1].read_bytes())

    yield Breakage("the same file again", not model.is_gguf, spoil=twice)
    if not model.is_gguf:
        yield Breakage("parts of matrices in two files", False, change=lambda model: replace(model, parts=2))


def _of_config(model: Model) -> Iterator[Breakage]:
    def at(path: tuple[str, ...], value: object, drop: bool) -> Callable[[Model], Model]:
        return lambda model: replace(model, config=_with(dict(model.config), path, value, drop))

    for path in _paths(model.config["quantization_config"], ("quantization_config",)):
        yield Breakage(f"{'.'.join(path)} dropped", path[-1] == "config_groups", change=at(path, None, True))
        for value in HOSTILE:
            yield Breakage(f"{'.'.join(path)} = {value!r}", _is_fatal(path[-1], value), change=at(path, value, False))
    for key in ("hidden_size", "intermediate_size", "num_local_experts"):
        for value in (0, -1, 257, 512, 1 << 17) if key in model.config else ():
            yield Breakage(f"{key} = {value}", True, change=at((key,), value, False))


def _is_fatal(key: str, value: object) -> bool:
    if key in ("bits", "num_bits"):
        return True
    if key == "quant_method":
        return value is not None
    return key in ("group_size", "weight_block_size") and value in (0, 3, 1.5, "", "marlin", [0, 0], [-1, 64])


def _paths(value: object, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if len(path) > 1 or not isinstance(value, dict):
        yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from _paths(inner, (*path, key))


def _with(values: dict[str, Any], path: tuple[str, ...], value: object, drop: bool) -> dict[str, Any]:
    first, *rest = path
    if rest:
        return values | {first: _with(dict(values[first]), tuple(rest), value, drop)}
    return {key: each for key, each in values.items() if key != first} if drop else values | {first: value}


def _of_metadata(model: Model) -> Iterator[Breakage]:
    def changed(key: str, value: object) -> Callable[[Model], Model]:
        facts = {name: each for name, each in model.metadata.items() if name != key}
        return lambda model: replace(model, metadata=facts if value is None else facts | {key: value})

    sizes: tuple[str, ...] = ("block_count", "embedding_length", "feed_forward_length", "head_count")
    if any("_exps" in name for name in model.tensors):
        sizes = tuple(
            size for size in sizes if size != "feed_forward_length"
        )  # no layer may be dense, and widths follow
    for key in model.metadata:
        for value in _GGUF_HOSTILE if not key.startswith("tokenizer") else (None,):
            if value == model.metadata[key]:
                continue
            is_fatal = key.endswith(sizes) and value not in (1, True)
            yield Breakage(f"{key} = {value!r}", is_fatal, change=changed(key, value))
    for value in (2, 3, 1 << 31, -1, "x"):
        yield Breakage(f"split.count = {value!r}", model.parts == 1 or value != 2, change=changed("split.count", value))
