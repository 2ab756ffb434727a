"""Decide where the matrices of a GGUF file stay packed."""

from dataclasses import replace
from typing import Any

from mgpu.orchestrator.placement.machine.cpu_features import multiplies_packed
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.protocol.model.facts import Dtype, ModelFacts
from mgpu.protocol.model.weight_format import DENSE, HELD, LayerFormats, WeightFormat


def facts_as_held(facts: ModelFacts, machine: Machine, dtype: Dtype) -> ModelFacts:
    """Return the facts with the formats in which a GGUF file is held; on GPUs that are the file's.

    On the CPU matrices stay packed where they are multiplied so, in bfloat16: 4 bits, and where workers can compile
    their kernels 8 bits, MXFP4 and IQ4 too, and then experts, embedding and head. Others are widened while they are
    read, since a product with them would take three to five times as long packed as dense. float32 widens all: its
    answers are exact.
    """
    edges = facts.embedding_format, facts.head_format
    stored = (*edges, *(form for layer in facts.formats for form in layer.formats_of("down")))
    if machine.kind != "cpu" or not any(form.block for form in stored):
        return facts
    if dtype != "bfloat16" or not multiplies_packed(machine.cpu_flags):
        return replace(facts, embedding_format=DENSE, head_format=DENSE, formats=())
    widths = ("4", "8", "fp4", "nl4") if machine.has_compiler else ("4",)
    embedding, head = (form if machine.has_compiler and _is_in(widths, form) else DENSE for form in edges)
    facts = replace(facts, embedding_format=embedding, head_format=head)
    formats = tuple(
        _multiplied(form, widths, facts.experts_of(layer) is not None and not machine.has_compiler)
        for layer, form in enumerate(facts.formats)
    )
    is_dense = all(form == LayerFormats() for form in formats)
    return replace(facts, formats=() if is_dense else formats)


def _multiplied(formats: LayerFormats, widths: tuple[str, ...], widens_experts: bool) -> LayerFormats:
    """Return the formats of a layer with all that is not multiplied packed made dense."""
    changes: dict[str, Any] = {}
    for held in HELD:
        is_expert = widens_experts and held in ("gate_up", "down")
        if is_expert or not all(_is_in(widths, form) for form in formats.formats_of(held)):
            changes[held] = DENSE
            if formats.parts_of(held):
                changes[f"{held}_parts"] = ()
    return replace(formats, **changes)


def _is_in(widths: tuple[str, ...], form: WeightFormat) -> bool:
    return form.quant in widths and form.group == 32
