"""CPU workers beside the other devices of a machine: the names of devices, and the machine that has them.

``cpu`` in a layer map or a topology file is a worker that the machine does not have without it. On a machine with GPUs
it holds the layers that do not fit there; on one without, it is one more CPU worker.
"""

import re
from dataclasses import replace

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.machine.nvml import Link
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.protocol.model.placement import PlacementPlan, Stage

MOST_ADDED = 64


def added_workers(machine: Machine, options: LayoutOptions) -> int:
    """Return how many CPU workers a layer map or a topology file adds to a machine. PlacementError for odd numbers."""
    if options.device_layers is not None:
        return len(re.findall(r"cpu", options.device_layers))
    if options.topology is None:
        return 0
    names = {name for rule in options.topology.rules for name in rule.devices}
    if machine.kind == "cpu":
        return int("cpu" in names)
    numbers = {0 if name == "cpu" else int(name[4:-1]) for name in names if name.startswith("cpu")}
    missing = set(range(max(numbers, default=-1) + 1)) - numbers
    if missing or len(numbers) > MOST_ADDED:
        raise PlacementError(
            f"{options.topology.source}: CPU workers are cpu[0], cpu[1] and so on, {MOST_ADDED} at most, and "
            f"cpu[{max(numbers)}] is named without cpu[{min(missing, default=MOST_ADDED)}]"
        )
    return len(numbers)


def with_cpu_workers(machine: Machine, count: int) -> Machine:
    """Return the machine with so many CPU workers after its devices. All CPU workers share the host's memory."""
    if not count:
        return machine
    old = len(machine.devices)
    if machine.kind == "cpu":
        total, free = (
            sum(sizes) for sizes in zip(*((each.total_bytes, each.free_bytes) for each in machine.devices), strict=True)
        )
        sharers = old + count
        kept = tuple(
            replace(each, total_bytes=total // sharers, free_bytes=free // sharers) for each in machine.devices
        )
    else:
        total, free = machine.host_bytes
        sharers, kept = count, machine.devices
    added = tuple(
        DeviceInfo(
            old + index,
            "cpu",
            f"CPU worker {index + (old if machine.kind == 'cpu' else 0)}",
            total // sharers,
            free // sharers,
        )
        for index in range(count)
    )
    none: Link = "none"
    own: Link = "self"
    rows = [(*row, *[none] * count) for row in machine.links]
    rows += [tuple(own if a == b else none for b in range(old + count)) for a in range(old, old + count)]
    return replace(machine, devices=kept + added, links=tuple(rows))


def mixed_stage(placement: PlacementPlan, machine: Machine) -> Stage | None:
    """Return a stage that is split over GPUs and CPU workers, which nothing can add up; None if there is none."""
    for stage in placement.stages if machine.kind == "cuda" else ():
        if len({machine.devices[ordinal].kind for ordinal in stage.devices}) > 1:
            return stage
    return None


def device_name(machine: Machine, ordinal: int) -> str:
    """Return a device as topology files write it."""
    if machine.devices[ordinal].kind == "cuda":
        return f"cuda[{ordinal}]"
    gpus = sum(device.kind == "cuda" for device in machine.devices)
    return f"cpu[{ordinal - gpus}]"


def ordinal_of(name: str, machine: Machine) -> int:
    """Return the ordinal of a device that a topology file names, on the machine without added CPU workers.

    PlacementError when there is no such device.
    """
    count, number = len(machine.devices), 0 if name == "cpu" else int(name[name.index("[") + 1 : -1])
    if machine.kind == "cuda" and name.startswith("cpu"):
        return count + number
    if name == "cpu":
        return count
    if name.startswith("cuda") and machine.kind == "cpu":
        raise PlacementError(f'"{name}": no GPU is visible; CPU workers are "cpu[0]" to "cpu[{count - 1}]"')
    if number >= count:
        kind = name[: name.index("[")]
        more = f"; --workers {number + 1} makes more" if kind == "cpu" else ""
        raise PlacementError(f'"{name}" is not visible; there are "{kind}[0]" to "{kind}[{count - 1}]"{more}')
    return number
