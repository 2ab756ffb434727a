"""Decide into how many tensor-parallel ranks a model can be split."""

from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.quantization import Quant, group_problems


def compatible_sizes(facts: ModelFacts, quant: Quant = "none") -> tuple[int, ...]:
    """List every tensor-parallel size that the model allows, from 1 to its number of query heads."""
    return tuple(size for size in range(1, facts.num_q_heads + 1) if not split_problems(facts, size, quant))


def split_problems(facts: ModelFacts, size: int, quant: Quant = "none") -> list[str]:
    """List the parts of the model that ``size`` ranks cannot share; empty when the size is compatible.

    Shares of the MLP's width may differ by one column. The vocabulary never stands in the way (it is padded), nor do
    a file's quantization blocks (rows are read as needed and dequantized), but int4 groups must not be cut. More ranks
    than KV heads are fine when each head can be held by the same number of ranks.
    """
    q_heads, kv_heads, width = facts.num_q_heads, facts.num_kv_heads, facts.intermediate_size
    problems = []
    if q_heads % size:
        problems.append(f"{q_heads} query heads % {size} = {q_heads % size}")
    if size <= kv_heads and kv_heads % size:
        problems.append(f"{kv_heads} KV heads % {size} = {kv_heads % size}")
    if size > kv_heads and size % kv_heads:
        problems.append(f"{size} ranks % {kv_heads} KV heads = {size % kv_heads}")
    if width < size:
        problems.append(f"MLP width {width} < {size} ranks")
    return problems + group_problems(quant, facts, size)


def advice_without_groups(facts: ModelFacts, size: int, quant: Quant) -> str:
    """Return the advice to use int8 if int4 groups are the only obstacle; else an empty text."""
    if not split_problems(facts, size, quant) or split_problems(facts, size):
        return ""
    return "; or --quant 8, which has no groups"


def sizes_text(facts: ModelFacts, quant: Quant) -> str:
    return ", ".join(map(str, compatible_sizes(facts, quant)))
