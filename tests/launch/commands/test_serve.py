"""What `serve` decides beside its options."""

import pytest

from harness.machines import cpus, gpus
from mgpu.launch.commands.serve import wants_standby
from mgpu.launch.settings.config import load_config
from mgpu.orchestrator.placement.machine.devices import Machine


@pytest.mark.parametrize(
    ("asked", "machine", "waits"),
    [
        ({}, gpus(80, 80), True),
        ({}, cpus(2), False),
        ({"standby": False}, gpus(80, 80), False),
        ({"standby": True}, cpus(2), True),
    ],
    ids=["GPUs", "CPU", "GPUs, --no-standby", "CPU, --standby"],
)
def test_processes_wait_for_the_next_epoch_with_gpus_or_as_asked(
    asked: dict[str, object], machine: Machine, waits: bool
) -> None:
    config, origins = load_config({"model": "demo", **asked}, {}, None)
    assert wants_standby(config, origins, machine) is waits
