"""Divide the layers of a model over devices: by a typed map, or balanced by bytes."""

import bisect
import re
import sys
from collections.abc import Sequence

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.split.divisibility import advice_without_groups, sizes_text, split_problems
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.quantization import Quant

ROOM_KEPT = 0.9
"""Least share of the room for keys and values that a faster division of layers must leave."""
_DEVICE = r"(?:[0-9]{1,6}|cpu)"
_PAIR = re.compile(rf"\s*({_DEVICE}(?:\s*\+\s*{_DEVICE})*)\s*:\s*([0-9]{{1,9}})\s*", re.ASCII)
"""ASCII: `int` does not strip every character that counts as a space elsewhere."""


def parse_layer_map(
    text: str,
    facts: ModelFacts,
    num_devices: int,
    noun: str,
    quant: Quant = "none",
    experts: ExpertSplit | None = None,
) -> PlacementPlan:
    """Read ``"0:32;1:32"``; ``"0+1:16;2+3:16"`` splits each range tensor-parallel over several devices.

    Each ``cpu`` is a CPU worker of its own, after the ``num_devices`` others: ``"0:40;cpu:24"``.
    PlacementError with the numbers when the format is wrong, an ordinal is not visible or named twice, a count is
    below 1, the sum is not the number of layers, or a stage cannot be split over its devices.
    """
    stages: list[Stage] = []
    first, seen = 0, set[int]()
    for pair in text.split(";"):
        match = _PAIR.fullmatch(pair)
        if match is None:
            raise _format_error(text, pair, facts, num_devices)
        ordinals, count = [], int(match[2])
        for name in match[1].split("+"):
            if name.strip() == "cpu":
                ordinal = num_devices + sum(other >= num_devices for other in seen)
            else:
                ordinal = int(name)
                _check_ordinal(text, ordinal, seen, num_devices, noun, facts.num_layers)
            ordinals.append(ordinal)
            seen.add(ordinal)
        if count < 1:
            raise PlacementError(
                f'-n "{text}": device {match[1]} gets {count} layers; every range needs at least 1 of the '
                f"{facts.num_layers} layers"
            )
        _check_stage_split(text, facts, tuple(ordinals), quant, experts)
        stages.append(Stage(first, first + count, tuple(ordinals)))
        first += count
    if first != facts.num_layers:
        raise _sum_error(text, first, facts, stages, num_devices)
    return PlacementPlan(tuple(stages))


def map_text(plan: PlacementPlan, num_devices: int = sys.maxsize) -> str:
    """Write a plan the way that ``-n`` reads it. Ordinals from ``num_devices`` on are CPU workers that it adds."""

    def names(stage: Stage) -> str:
        return "+".join(str(ordinal) if ordinal < num_devices else "cpu" for ordinal in stage.devices)

    return ";".join(f"{names(stage)}:{stage.num_layers}" for stage in plan.stages)


def _format_error(text: str, pair: str, facts: ModelFacts, num_devices: int) -> PlacementError:
    example = map_text(even_stages(facts.num_layers, list(range(min(num_devices, 2, facts.num_layers)))))
    return PlacementError(
        f'-n "{text[:200]}": {pair[:40]!r} is not an ordinal:count pair; write pairs separated by semicolons, such as '
        f'-n "{example}" (the model has {facts.num_layers} layers)'
    )


def _check_ordinal(text: str, ordinal: int, seen: set[int], num_devices: int, noun: str, layers: int) -> None:
    if ordinal >= num_devices:
        visible = "0" if num_devices == 1 else f"0 to {num_devices - 1}"
        more = f"; --workers {ordinal + 1} makes more" if noun.startswith("CPU") else ""
        raise PlacementError(
            f'-n "{text}": {noun} {ordinal} is not visible; visible ordinals: {visible}{more} '
            f"(the model has {layers} layers)"
        )
    if ordinal in seen:
        raise PlacementError(
            f'-n "{text}": {noun} {ordinal} is named twice; each may have one range of the {layers} layers'
        )


def _check_stage_split(
    text: str, facts: ModelFacts, ordinals: tuple[int, ...], quant: Quant, experts: ExpertSplit | None
) -> None:
    if problems := split_problems(facts, len(ordinals), quant, experts):
        raise PlacementError(
            f'-n "{text}": a stage of {len(ordinals)} devices cannot split this model: {"; ".join(problems)}; '
            f"compatible sizes: {sizes_text(facts, quant, experts)}"
            f"{advice_without_groups(facts, len(ordinals), quant, experts)}"
        )


def _sum_error(text: str, total: int, facts: ModelFacts, stages: list[Stage], num_devices: int) -> PlacementError:
    layers = facts.num_layers
    problem = f'-n "{text}": the counts add up to {total}, but the model has {layers} layers'
    if (last := stages[-1].num_layers + layers - total) >= 1:
        fixed = (*stages[:-1], Stage(0, last, stages[-1].devices))
        problem += f'; for example -n "{map_text(PlacementPlan(fixed), num_devices)}"'
    return PlacementError(problem)


def even_stages(num_layers: int, ordinals: Sequence[int]) -> PlacementPlan:
    """Divide layers into ranges whose lengths differ by at most one, longer ones first."""
    short, longer = divmod(num_layers, len(ordinals))
    return _stages([short + (i < longer) for i in range(len(ordinals))], ordinals)


def _stages(counts: Sequence[int], ordinals: Sequence[int]) -> PlacementPlan:
    stages, first = [], 0
    for ordinal, count in zip(ordinals, counts, strict=True):
        stages.append(Stage(first, first + count, (ordinal,)))
        first += count
    return PlacementPlan(tuple(stages))


def balanced_stages(
    num_layers: int,
    ordinals: Sequence[int],
    capacities: Sequence[int],
    layer_bytes: int,
    extras: Sequence[int],
    most: Sequence[int] = (),
) -> PlacementPlan:
    """Divide layers so that the device with the largest used share of its capacity is as empty as possible.

    ``capacities`` and ``extras`` (embedding, LM head) are bytes per device. Every device gets at least one layer, so
    there must not be more devices than layers. ``most`` bounds the layers of each device; all layers must have room
    within. The answer is the smallest fullness at which all layers have room; only
    the fullness of some device with some number of layers can be that, so it is found among those by bisection.
    Example: 30 layers of 1 GiB on devices of 20 and 40 GiB: 10 and 20 layers, both half full.
    """
    assert 1 <= len(ordinals) <= num_layers
    limits = [max(1, capacity) for capacity in capacities]

    def fullness(device: int, count: int) -> float:
        return (count * layer_bytes + extras[device]) / limits[device]

    def most_layers(device: int, ratio: float) -> int:
        # bisect, not a division: the count must agree with `fullness` to the last bit
        count = bisect.bisect_right(range(num_layers + 1), ratio, key=lambda count: fullness(device, count)) - 1
        return min(count, most[device]) if most else count

    devices = range(len(ordinals))
    least = max(fullness(device, 1) for device in devices)
    ratios = sorted({least} | {fullness(d, c) for d in devices for c in range(2, num_layers + 1)})
    ratios = [ratio for ratio in ratios if ratio >= least]
    index = bisect.bisect_left(ratios, num_layers, key=lambda ratio: sum(most_layers(d, ratio) for d in devices))
    counts = [most_layers(device, ratios[index]) for device in devices]
    while sum(counts) > num_layers:
        fullest = max((d for d in devices if counts[d] > 1), key=lambda d: (fullness(d, counts[d]), d))
        counts[fullest] -= 1
    return _stages(counts, ordinals)


def quick_stages(
    num_layers: int,
    ordinals: Sequence[int],
    capacities: Sequence[int],
    layer_bytes: int,
    extras: Sequence[int],
    read_extras: Sequence[int],
    rates: Sequence[float] = (),
    enough: float = float("inf"),
) -> PlacementPlan:
    """Divide layers over devices so that stages take equally long, as far as that leaves room for the KV cache.

    A stage of a decode step takes as long as reading its weights. Beside its layers, the last one reads the LM head,
    but the first one reads only some rows of the embedding: ``read_extras`` (bytes per device). ``rates`` are the bytes
    per second of each device, if they differ. No device gets so many layers that less than `ROOM_KEPT` of the KV cache
    of `balanced_stages` would be left, or less than ``enough`` bytes for each layer.
    Example: 32 layers of 436 MB and a head of 1,051 MB, as Llama 3.1 8B has: 17 and 15 layers.
    """

    def room(plan: PlacementPlan) -> float:
        used = [count * layer_bytes + extra for count, extra in zip(_counts(plan), extras, strict=True)]
        left = [capacity - each for capacity, each in zip(capacities, used, strict=True)]
        return min(each / count for each, count in zip(left, _counts(plan), strict=True))

    by_room = balanced_stages(num_layers, ordinals, capacities, layer_bytes, extras)
    kept = min(enough, ROOM_KEPT * room(by_room))
    if kept <= 0:
        return by_room
    most = (
        [
            max(count, int((capacity - extra) / (layer_bytes + kept)))
            for count, capacity, extra in zip(_counts(by_room), capacities, extras, strict=True)
        ]
        if rates
        else []
    )
    speeds = [max(1, round(rate / 1e6)) for rate in rates] or [1] * len(ordinals)
    by_time = balanced_stages(num_layers, ordinals, speeds, layer_bytes, read_extras, most)
    return by_time if rates or room(by_time) >= kept else by_room


def _counts(plan: PlacementPlan) -> list[int]:
    return [stage.num_layers for stage in plan.stages]
