"""The devices of all hosts that have joined, as one machine to plan on. The ordinal of a device is its rank."""

from dataclasses import replace

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.hosts.roster import Roster
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine, nccl_problem, uniform_links
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.host_messages import Hello
from mgpu.protocol.model.layout import Layout

_NO_GPUS = "NCCL needs GPUs"


def machine_of(roster: Roster, environ: dict[str, str]) -> Machine:
    """Return the machine that the members of a whole roster make together.

    Nothing is known of the ways between its devices but that they lead over the network: no peer access, and no shared
    memory.
    """
    hellos = [roster.members[rank].hello for rank in range(roster.world_size)]
    devices = tuple(_device(hello) for hello in hellos)
    problem = nccl_problem(environ) if devices[0].kind == "cuda" else _NO_GPUS
    hosts = tuple(hello.host for hello in hellos)
    return Machine(devices, uniform_links(len(devices), "none"), problem, hosts=hosts)


def repeated(machine: Machine, nodes: int) -> Machine:
    """Return the machine that so many hosts like ``machine`` will make together once they have joined."""
    count = len(machine.devices)
    devices = tuple(
        replace(device, ordinal=node * count + device.ordinal) for node in range(nodes) for device in machine.devices
    )
    hosts = tuple(f"host {node}" for node in range(nodes) for _ in range(count))
    note = f"{counted(nodes, 'host')} with {counted(count, 'device')} each; serve plans with those that join"
    problem = machine.nccl_problem if machine.kind == "cuda" else _NO_GPUS
    return replace(
        machine, devices=devices, links=uniform_links(len(devices), "none"), nccl_problem=problem, shared_memory=False,
        kinds=machine.kinds * nodes, distances=(), hosts=hosts, notes=(note,),
    )  # fmt: skip


def check_layout(layout: Layout, roster: Roster) -> None:
    """Raise PlacementError if a layout does not use each rank that has joined once."""
    used = sorted(device for stage in layout.placement.stages for device in stage.devices)
    if used == list(range(roster.world_size)):
        return
    idle = [rank for rank in range(roster.world_size) if rank not in used]
    what = f"leaves out rank {idle[0]}" if idle else "uses a rank twice"
    raise PlacementError(
        f"{counted(roster.world_size, 'rank')} have joined, and the layout has {len(used)} and {what}: every rank of "
        'the launcher takes part once. Start fewer, or leave --tp out, or name all in -n, such as "0:16;1:16"'
    )


def _device(hello: Hello) -> DeviceInfo:
    device, capability = hello.device, hello.device.capability
    name = f"CPU of {hello.host}" if device.kind == "cpu" else f"{device.name} of {hello.host}"
    return DeviceInfo(
        hello.rank, device.kind, name, device.total_bytes, device.free_bytes, device.uuid,
        capability=(capability[0], capability[1]) if len(capability) == 2 else None,
    )  # fmt: skip
