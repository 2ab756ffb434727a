"""Tensor parallelism by unequal shares, for unequal GPUs: read and check ``--tp-shares``."""

import re

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.split.divisibility import sizes_text, split_problems
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import PlacementPlan, Stage, TensorPart
from mgpu.protocol.model.quantization import Quant, formats_of


def uneven_stage(facts: ModelFacts, machine: Machine, options: LayoutOptions, text: str) -> PlacementPlan:
    """Return one stage whose devices have so many KV heads each. PlacementError with the numbers and the way out."""
    shares = _read(facts, text)
    problems = _contradictions(options, len(shares)) or _share_problems(facts, shares)
    if not problems and len(shares) > len(machine.devices):
        count = len(machine.devices)
        way_out = f"--workers {len(shares)} makes more" if machine.kind == "cpu" else f"write at most {count} shares"
        problems = [f"{len(shares)} shares, and {count} device{'s' * (count > 1)} can be used; {way_out}"]
    is_even = len(set(shares)) == 1
    if not problems and is_even:
        problems = split_problems(facts, len(shares), options.quant, options.experts)
    elif not problems:
        problems = _slice_problems(facts, shares, options.quant, options.experts or "tensor")
    if problems:
        raise PlacementError(f"--tp-shares {text[:80]}: {'; '.join(problems)}")
    return PlacementPlan((Stage(0, facts.num_layers, tuple(range(len(shares))), () if is_even else shares),))


def example_shares(facts: ModelFacts, size: int) -> str:
    """Return shares for so many ranks that differ by one head at most; empty if there are fewer KV heads."""
    short, longer = divmod(facts.num_kv_heads, size)
    return ",".join(str(short + (rank < longer)) for rank in range(size)) if short else ""


def _read(facts: ModelFacts, text: str) -> tuple[int, ...]:
    if re.fullmatch(r"\s*[0-9]{1,4}\s*(,\s*[0-9]{1,4}\s*)*", text, re.ASCII) is None:
        example = example_shares(facts, min(3, facts.num_kv_heads))
        raise PlacementError(
            f"--tp-shares {text[:80]!r}: write the KV heads of each GPU, separated by commas, such as {example} (the "
            f"model has {facts.num_kv_heads} KV heads)"
        )
    return tuple(map(int, text.split(",")))


def _contradictions(options: LayoutOptions, count: int) -> list[str]:
    if options.tp is not None and options.tp != count:
        return [f"{count} shares, and --tp {options.tp}; drop --tp"]
    if options.device_layers is not None:
        return [f'-n "{options.device_layers}" says already which devices are used; drop one of them']
    if options.topology is not None and options.topology.places:
        return [f"{options.topology.source} says already which devices are used; drop one of them"]
    return []


def _share_problems(facts: ModelFacts, shares: tuple[int, ...]) -> list[str]:
    heads = facts.num_kv_heads
    if facts.borrowed is not None:
        return [f"transformers' code, which runs this {facts.architecture} model, splits evenly only; use --tp"]
    if facts.latent is not None and len(shares) > 1:
        return [f"the {facts.num_q_heads} heads of latent attention are split evenly only; use --tp {len(shares)}"]
    if facts.linear is not None and len(set(shares)) > 1:
        key_heads = facts.linear.key_heads
        return [f"the {key_heads} key heads of linear attention are split evenly only; use --tp {len(shares)}"]
    if facts.full_heads is not None and len(set(shares)) > 1:
        full = facts.full_heads.num_kv
        return [f"full layers have {full} KV heads, others {heads}, which split evenly only; use --tp {len(shares)}"]
    if facts.per_layer is not None and len(set(shares)) > 1:
        return [f"the table of inputs of each layer is split evenly only; use --tp {len(shares)}"]
    if min(shares) < 1:
        return [f"each GPU needs at least 1 of the {heads} KV heads"]
    if sum(shares) != heads:
        example = example_shares(facts, len(shares))
        instead = f"for example --tp-shares {example}" if example else f"at most {heads} GPUs can share them"
        return [f"the shares add up to {sum(shares)}, but the model has {heads} KV heads; {instead}"]
    return []


def _slice_problems(facts: ModelFacts, shares: tuple[int, ...], quant: Quant, split: ExpertSplit) -> list[str]:
    """Return what cannot be cut at the borders of these shares."""
    found: dict[str, None] = {}
    head_size = facts.num_q_heads // facts.num_kv_heads * facts.head_dim
    for layer in range(facts.num_layers):
        formats, experts = formats_of(facts, layer, quant), facts.experts_of(layer)
        if head_size % formats.out.splits_at:
            found[
                f"a KV head has {head_size} columns of the attention output, not a multiple of {formats.out.splits_at} "
                f"({formats.out.name}); --quant 8 has no groups"
            ] = None
        widths = [("MLP width", facts.intermediate_size, formats.down.splits_at)]
        if experts is not None:
            widths = [("experts", experts.count, 1)] if split == "parallel" else []
            widths += [("expert width", experts.width, formats.down.splits_at)] if split == "tensor" else []
            widths += [("shared expert's width", experts.shared_width, formats.shared_down.splits_at)] * bool(
                experts.shared_width
            )
        for name, width, step in widths:
            parts = [len(TensorPart(rank, len(shares), shares).columns(width, step)) for rank in range(len(shares))]
            if min(parts) < 1:
                found[f"{name} {width} is too narrow: {' + '.join(map(str, parts))} in steps of {step}"] = None
    return [f"{problem}. Sizes that split evenly: {sizes_text(facts, quant)}" for problem in found]
