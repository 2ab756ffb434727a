"""Decide into how many tensor-parallel ranks a model can be split, and how its ranks share experts."""

from collections.abc import Iterable

from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.quantization import Quant, group_problems

_SPLITS: tuple[ExpertSplit, ...] = ("tensor", "parallel")


def compatible_sizes(facts: ModelFacts, quant: Quant = "none", experts: ExpertSplit | None = None) -> tuple[int, ...]:
    """List every tensor-parallel size that the model allows, from 1 to its number of query heads."""
    sizes = range(1, facts.num_q_heads + 1)
    return tuple(size for size in sizes if not split_problems(facts, size, quant, experts))


def split_problems(
    facts: ModelFacts, size: int, quant: Quant = "none", experts: ExpertSplit | None = None
) -> list[str]:
    """List the parts of the model that ``size`` ranks cannot share; empty when the size is compatible.

    Shares of the MLP's width may differ by one column. The vocabulary never stands in the way (it is padded), nor do
    a file's quantization blocks (rows are read as needed and dequantized), but int4 groups must not be cut. More ranks
    than KV heads are fine when each head can be held by the same number of ranks. ``experts`` None: ranks may share
    experts either way.
    """
    q_heads, kv_heads = facts.num_q_heads, facts.num_kv_heads
    problems = []
    if size > 1 and facts.borrowed is not None and not facts.borrowed.can_split:
        problems.append(f"transformers has no plan to split {facts.architecture}")
    if q_heads % size:
        problems.append(f"{q_heads} query heads % {size} = {q_heads % size}")
    problems += _kv_problems(kv_heads, size)
    if facts.full_heads is not None:
        problems += [f"{problem} in full layers" for problem in _kv_problems(facts.full_heads.num_kv, size)]
    if facts.linear is not None and facts.linear.key_heads % size:
        heads = facts.linear.key_heads
        problems.append(f"{heads} key heads of linear attention % {size} = {heads % size}")
    if facts.has_dense_layers and facts.intermediate_size < size:
        problems.append(f"MLP width {facts.intermediate_size} < {size} ranks")
    split = experts or expert_split(facts, [size], quant)
    return problems + _expert_problems(facts, size, split) + group_problems(quant, facts, size, split)


def _kv_problems(kv_heads: int, size: int) -> list[str]:
    if size <= kv_heads and kv_heads % size:
        return [f"{kv_heads} KV heads % {size} = {kv_heads % size}"]
    if size > kv_heads and size % kv_heads:
        return [f"{size} ranks % {kv_heads} KV heads = {size % kv_heads}"]
    return []


def _expert_problems(facts: ModelFacts, size: int, split: ExpertSplit) -> list[str]:
    if facts.experts is None:
        return []
    width, count, shared = facts.experts.width, facts.experts.count, facts.experts.shared_width
    if 0 < shared < size:
        return [f"shared expert's width {shared} < {size} ranks"]
    if split == "tensor":
        return [f"expert width {width} < {size} ranks"] if width < size else []
    return [f"{count} experts < {size} ranks"] if count < size else []


def expert_split(facts: ModelFacts, sizes: Iterable[int], quant: Quant) -> ExpertSplit:
    """Return how ranks share experts if nobody asks: slices of each, unless only whole ones can be shared.

    Slices give every rank the same work, whatever the router chooses.
    """
    for size in sizes:
        sliced, whole = (
            [*_expert_problems(facts, size, split), *group_problems(quant, facts, size, split)] for split in _SPLITS
        )
        if facts.experts is not None and len(whole) < len(sliced):
            return "parallel"
    return "tensor"


def advice_without_groups(facts: ModelFacts, size: int, quant: Quant, experts: ExpertSplit | None = None) -> str:
    """Return the advice to use int8 if int4 groups are the only obstacle; else an empty text."""
    if not split_problems(facts, size, quant, experts) or split_problems(facts, size, "none", experts):
        return ""
    whole = "; or --experts parallel, which cuts none" if not split_problems(facts, size, quant) else ""
    return f"{whole}; or --quant 8, which has no groups"


def sizes_text(facts: ModelFacts, quant: Quant, experts: ExpertSplit | None = None) -> str:
    return ", ".join(map(str, compatible_sizes(facts, quant, experts)))
