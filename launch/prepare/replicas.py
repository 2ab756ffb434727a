"""`serve --replicas N`: what each copy is started with, and which GPUs or cores it gets."""

import os
import sys
from collections.abc import Mapping
from dataclasses import replace

from mgpu.launch.prepare.planned_model import PlannedModel
from mgpu.launch.settings.config import ServeConfig, declared_options
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine, selectors
from mgpu.orchestrator.router.copies import CopyCommand
from mgpu.protocol.internal.counted import counted

OF_ROUTER = frozenset(
    {
        "model",
        "served_name",
        "replicas",
        "bind",
        "keys",
        "http",
        "http_keys",
        "http_no_auth",
        "http_cors",
        "http_tls_cert",
        "http_tls_key",
    }
)
"""Options that the router has itself, or says in its own words to the copies."""


def devices_per_copy(config: ServeConfig, machine: Machine) -> int:
    """Return how many GPUs each copy gets; 0 on the CPU. ConfigError if there are too few."""
    gpus = sum(device.kind == "cuda" for device in machine.devices)
    if not gpus or machine.kind == "cpu":
        return 0
    wanted = config.tp or _mapped_devices(config.device_layers) or gpus // config.replicas
    if wanted < 1 or config.replicas * wanted > gpus:
        each = max(1, wanted)
        raise ConfigError(
            f"--replicas {config.replicas} with {counted(each, 'GPU')} each need {config.replicas * each}, and "
            f"{gpus} {'are' if gpus > 1 else 'is'} visible; use --replicas {max(1, gpus // each)}"
        )
    return wanted


def _mapped_devices(device_layers: str) -> int:
    """Return how many GPUs a manual mapping has, 0 without one."""
    return max(device for stage in device_layers.split(";") for device in _ordinals(stage)) + 1 if device_layers else 0


def _ordinals(stage: str) -> list[int]:
    return [int(each) for each in stage.partition(":")[0].split("+") if each.strip().isdigit()] or [0]


def of_one_copy(config: ServeConfig) -> ServeConfig:
    """Return the options as one of the copies has them, on the whole machine. ConfigError if there are too few GPUs."""
    machine = find_machine(config.device, config.workers or None, config.oversubscribe)
    per_copy = devices_per_copy(config, machine)
    return replace(config, replicas=1, tp=per_copy if per_copy and not config.device_layers else config.tp)


def copy_commands(
    config: ServeConfig, origins: Mapping[str, str], planned: PlannedModel, environ: Mapping[str, str] = os.environ
) -> tuple[CopyCommand, ...]:
    """Return how to start each copy: the same options, and a share of the GPUs, or else of the cores."""
    machine = find_machine(config.device, config.workers or None, config.oversubscribe, environ)
    per_copy, cores = devices_per_copy(config, machine), sorted(os.sched_getaffinity(0))
    command = (sys.executable, "-m", "mgpu.launch.cli", "serve", *_words(config, origins, planned))
    variables = {option.variable for option in declared_options()} | {"MGPU_CONFIG"}
    env = {name: value for name, value in environ.items() if name not in variables}
    copies = []
    for at in range(config.replicas):
        cpus, own = frozenset(cores), dict(env)
        if per_copy:
            mine = machine.devices[at * per_copy : (at + 1) * per_copy]
            own |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": selectors(mine)}
        elif len(cores) >= config.replicas:
            cpus = frozenset(cores[at :: config.replicas])
        copies.append(CopyCommand(command, own, cpus))
    return tuple(copies)


def _words(config: ServeConfig, origins: Mapping[str, str], planned: PlannedModel) -> list[str]:
    """Write the options of a copy as they are typed."""
    name = config.served_name or planned.model.name
    words = [f"--model={planned.model.path}", f"--served-name={name}", "--http=none"]
    for option in declared_options():
        if origins.get(option.name, "default") == "default" or option.name in OF_ROUTER:
            continue
        value = getattr(config, option.field)
        if option.type is bool:
            words.append(option.flag if value else f"--no-{option.flag[2:]}")
        else:
            words.append(f"{option.flag}={int(value) if isinstance(value, int) else value}")
    return words
