"""Say what the GPUs of a placement cannot compute."""

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.protocol.model.placement import PlacementPlan

FP8_CAPABILITY = (8, 9)
"""The first GPUs that convert float8, without which the kernels of a float8 cache cannot be compiled."""


def device_without_fp8(machine: Machine, placement: PlacementPlan) -> DeviceInfo | None:
    """Find a device of the placement that cannot convert float8. The CPU can; what is not known is believed to."""
    for stage in placement.stages:
        for device in (machine.devices[index] for index in stage.devices):
            if device.capability is not None and device.capability < FP8_CAPABILITY:
                return device
    return None


def check_capability(machine: Machine, placement: PlacementPlan, options: LayoutOptions) -> None:
    """Refuse a float8 cache where plain torch would have to serve it, many times slower. PlacementError."""
    device = device_without_fp8(machine, placement)
    if options.kv_cache_dtype != "fp8" or device is None:
        return
    needed, has = (".".join(map(str, each)) for each in (FP8_CAPABILITY, device.capability or ()))
    raise PlacementError(
        f"--kv-cache-dtype fp8 needs GPUs of compute capability {needed} or later, and GPU {device.ordinal} "
        f"({device.name}) has {has}. Leave it out, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    )
