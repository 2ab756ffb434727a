"""Make stages of the places that a topology file names."""

from collections.abc import Callable
from itertools import groupby

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.cpu_workers import ordinal_of
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.split.divisibility import sizes_text, split_problems
from mgpu.orchestrator.placement.topology.rules import DeviceNames, Topology
from mgpu.orchestrator.placement.topology.select import named_places
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import PlacementPlan, Stage

Ordinals = tuple[int, ...]
Automatic = Callable[[bool], PlacementPlan]
"""Returns the placement that nobody asked for; with True, one of layers on single devices."""


def named_stages(
    topology: Topology, facts: ModelFacts, machine: Machine, options: LayoutOptions, automatic: Automatic
) -> PlacementPlan:
    """Place a model as a topology file says; what it does not name keeps the automatic placement.

    An embedding or a head that is not with its neighbouring layers is a stage of its own, without layers.
    PlacementError when a device is not there, a stage does not split, or the layers of a device are not one range.
    """

    def ordinals(names: DeviceNames) -> Ordinals:
        try:
            return tuple(ordinal_of(name, machine) for name in names)
        except PlacementError as error:
            raise PlacementError(f"{topology.source}: {error}") from error

    named = named_places(topology, facts)
    layers = [ordinals(names) for names in named.layers]
    if not all(layers):
        usual = _by_layer(automatic(any(layers)))
        layers = [own or usual[layer] for layer, own in enumerate(layers)]
    stages = _ranges(topology, facts, layers)
    for size in {len(stage.devices) for stage in stages}:
        if problems := split_problems(facts, size, options.quant, options.experts):
            raise PlacementError(
                f"{topology.source}: {size} devices cannot split this model: {'; '.join(problems)}; compatible sizes: "
                f"{sizes_text(facts, options.quant, options.experts)}"
            )
    if (embedding := ordinals(named.embedding)) and embedding != stages[0].devices:
        stages.insert(0, Stage(0, 0, embedding))
    if (head := ordinals(named.head)) and head != stages[-1].devices:
        stages.append(Stage(facts.num_layers, facts.num_layers, head))
    if machine.kind == "cuda" and all(each >= len(machine.devices) for stage in stages for each in stage.devices):
        raise PlacementError(f"{topology.source}: everything is on the CPU; use --device cpu instead")
    return PlacementPlan(tuple(stages))


def _by_layer(plan: PlacementPlan) -> list[Ordinals]:
    return [stage.devices for stage in plan.stages for _ in range(stage.num_layers)]


def _ranges(topology: Topology, facts: ModelFacts, layers: list[Ordinals]) -> list[Stage]:
    """Join neighbouring layers of the same devices. PlacementError if a device has two ranges."""
    stages: list[Stage] = []
    for devices, run in groupby(range(facts.num_layers), key=lambda layer: layers[layer]):
        numbers = list(run)
        stages.append(Stage(numbers[0], numbers[-1] + 1, devices))
    seen: dict[int, Stage] = {}
    for stage in stages:
        for ordinal in stage.devices:
            if ordinal in seen:
                raise _two_ranges(topology, ordinal, seen[ordinal], stage, stages)
            seen[ordinal] = stage
    return stages


def _two_ranges(topology: Topology, ordinal: int, first: Stage, second: Stage, stages: list[Stage]) -> PlacementError:
    table = ", ".join(f"{stage.first_layer}-{stage.end_layer}: {_text(stage.devices)}" for stage in stages)
    return PlacementError(
        f"{topology.source}: device {ordinal} would have the layers {first.first_layer}-{first.end_layer} and "
        f"{second.first_layer}-{second.end_layer}, with others between; the layers of a device must be one range. All "
        f"layers, those that no rule names included: {table}"
    )


def _text(devices: Ordinals) -> str:
    return "+".join(map(str, devices))
