"""Decide where the matrices of a GGUF file stay packed."""

from dataclasses import replace

from mgpu.orchestrator.placement.devices import Machine
from mgpu.protocol.model.facts import ModelFacts


def facts_as_held(facts: ModelFacts, machine: Machine) -> ModelFacts:
    """Return the facts without formats if a GGUF file is widened while it is read: on the CPU.

    A packed product there takes three to five times as long as a dense one.
    """
    is_gguf = any(form.block for layer in facts.formats for form in layer.formats_of("down"))
    return replace(facts, formats=()) if is_gguf and machine.kind == "cpu" else facts
