"""Run the few PTX instructions that kernels have inline, on numbers: what the interpreter of Triton cannot do."""

import re
from collections.abc import Mapping, Sequence

import torch

_HALVES = torch.bfloat16


def run_ptx(text: str, registers: Mapping[str, int]) -> dict[str, int]:
    """Return the 32-bit registers after the instructions of one thread; ``$0`` and so on are operands."""
    found = dict(registers)

    def value(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else found[name]

    body = re.sub(r"\.reg [^;]*;|[{}]", "", text)
    for line in filter(None, (part.strip() for part in body.split(";"))):
        name, _, rest = line.partition(" ")
        target, *given = (part.strip() for part in rest.split(","))
        found[target] = _result(name, [value(each) for each in given])
    return found


def _result(name: str, given: list[int]) -> int:
    if name == "mov.b32":  # two halves, in braces, become a word
        return given[0] if len(given) == 1 else given[0] | given[1] << 16
    if name == "and.b32":
        return given[0] & given[1]
    if name == "or.b32":
        return given[0] | given[1]
    if name == "shr.u32":
        return given[0] >> given[1]
    if name == "lop3.b32":
        *bits, table = given
        index = [sum((each >> place & 1) << 2 - at for at, each in enumerate(bits)) for place in range(32)]
        return sum((table >> index[place] & 1) << place for place in range(32))
    if name == "shl.b32":
        return given[0] << given[1] & 0xFFFFFFFF
    if name == "mul.lo.u32":
        return given[0] * given[1] & 0xFFFFFFFF
    if name.startswith("dp2a."):
        numbers = [(half ^ 0x8000) - 0x8000 for half in (given[0] & 0xFFFF, given[0] >> 16)]
        octets: Sequence[int] = given[1].to_bytes(4, "little")[2 * name.startswith("dp2a.hi") :]
        if name.endswith(".s32"):
            octets = [(octet ^ 0x80) - 0x80 for octet in octets]
        return (sum(a * b for a, b in zip(numbers, octets, strict=False)) + given[2]) & 0xFFFFFFFF
    if name == "prmt.b32":
        octets = (given[0] | given[1] << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(octets[given[2] >> 4 * place & 7] for place in range(4)), "little")
    if name == "fma.rn.bf16x2":
        a, b, c = (_pair(each) for each in given)
        return _bits((a.double() * b.double() + c.double()).to(_HALVES))
    if name in ("sub.rn.bf16x2", "mul.rn.bf16x2"):
        a, b = (_pair(each).double() for each in given)
        return _bits((a * b if name.startswith("mul") else a - b).to(_HALVES))
    if name == "fma.rn.f16x2":
        a, b, c = (_pair(each, torch.float16).double() for each in given)
        return _bits((a * b + c).to(torch.float16))
    if name == "mul.rn.f16x2":
        a, b = (_pair(each, torch.float16).double() for each in given)
        return _bits((a * b).to(torch.float16))
    if name == "cvt.rn.satfinite.e4m3x2.f16x2":
        octets = _pair(given[0], torch.float16).float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return int(octets[0]) | int(octets[1]) << 8
    raise AssertionError(f"unknown instruction {name}")


def _pair(bits: int, dtype: torch.dtype = _HALVES) -> torch.Tensor:
    return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.uint16).view(dtype)


def _bits(pair: torch.Tensor) -> int:
    low, high = pair.view(torch.uint16).tolist()
    return int(low) | int(high) << 16
