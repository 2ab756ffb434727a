"""Say what a layout costs that puts part of a model where it is slow: on the CPU, or beside another stage."""

from mgpu.orchestrator.placement.fit import gib
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.rank_row import RankRow
from mgpu.orchestrator.placement.split.stage_order import crossings
from mgpu.protocol.model.layout import Layout

_SLOW = 0.95
HOST_BYTES_PER_S = 100e9
"""What the memory of a server's socket delivers: assumed, since nothing here measures it."""


def cost_notes(machine: Machine, layout: Layout, rows: tuple[RankRow, ...]) -> list[str]:
    """Return a line for each stage on the CPU beside GPUs, and for stages that share a GPU."""
    if machine.kind == "cpu":
        return []
    return [*_on_the_cpu(rows), *_sharing(layout, rows)]


def way_notes(machine: Machine, layout: Layout) -> list[str]:
    """Return what is said of the ways between stages, and of GPUs that are slower than they could be."""
    notes, stages = [], layout.placement.stages
    order = [stage.devices[0] for stage in stages if len(stage.devices) == 1]
    gpus = [ordinal for ordinal in order if machine.devices[ordinal].kind == "cuda"]
    if len(gpus) == len(stages) > 2 and gpus != sorted(gpus):
        text = ", ".join(map(str, gpus))
        notes.append(f"stages in the order of GPUs {text}: {crossings(machine, gpus)} boundaries between sockets")
    slow = [device for device in machine.gpus if device.speed < _SLOW]
    notes += [f"GPU {each.ordinal} is busy: {each.speed:.0%} of its speed were measured" for each in slow]
    return notes


def _on_the_cpu(rows: tuple[RankRow, ...]) -> list[str]:
    notes = []
    for row in (row for row in rows if row.device.kind == "cpu"):
        took_ms = 1e3 * row.weight_bytes / HOST_BYTES_PER_S
        what = f"layers {row.first_layer} to {row.end_layer - 1}" if row.end_layer > row.first_layer else "a table"
        notes.append(
            f"{what} on the CPU: each step reads {gib(row.weight_bytes)} of weights from the machine's memory, which "
            f"takes {took_ms:.0f} ms at an assumed {HOST_BYTES_PER_S / 1e9:.0f} GB/s; steps of the GPUs are no CUDA "
            "graphs then"
        )
    return notes


def _sharing(layout: Layout, rows: tuple[RankRow, ...]) -> list[str]:
    """Return what it costs that an embedding or a head is on a GPU of other layers."""
    notes = []
    for stage in layout.placement.stages:
        others = [row for row in rows if row.device.ordinal in stage.devices and row.end_layer > row.first_layer]
        if stage.num_layers or not others:
            continue
        what = "embedding" if stage is layout.placement.stages[0] else "head"
        notes.append(
            f"the {what} shares GPU {others[0].device.ordinal} with layers {others[0].first_layer} to "
            f"{others[0].end_layer - 1}: a process of its own, and no step is a CUDA graph"
        )
    return notes
