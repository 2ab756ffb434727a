"""Prepare a server before its first process: find the model, read its headers, place it."""

import contextlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from mgpu.launch.prepare.measured import measured, needs_measuring
from mgpu.launch.prepare.parts import part_of
from mgpu.launch.settings.config import ServeConfig
from mgpu.orchestrator.errors import ModelError
from mgpu.orchestrator.host.listening import NONE
from mgpu.orchestrator.hosts.machine import repeated
from mgpu.orchestrator.models.find import ResolvedModel, check_loadable, read_model, resolve_model
from mgpu.orchestrator.placement.machine.control_groups import usable_cpus
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.machine.devices import Machine, find_machine
from mgpu.orchestrator.placement.machine.pair_check import PAIR_RECORD, checked, read_record, with_verdicts
from mgpu.orchestrator.placement.options import LayoutOptions, implied_workers
from mgpu.orchestrator.placement.planner import Plan, plan
from mgpu.orchestrator.placement.topology.file import read_topology
from mgpu.orchestrator.processes.task_limits import check_task_limit, tasks_of_server
from mgpu.protocol.cache_root import cache_root
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.read import Checkpoint, has_weights
from mgpu.protocol.checkpoint.sampling_defaults import read_sampling_defaults
from mgpu.protocol.model.facts import CheckpointFormat, ModelSource
from mgpu.protocol.model.sampling import SamplingDefaults


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that has been found, read and placed, with nothing started yet."""

    model: ResolvedModel
    checkpoint: Checkpoint
    plan: Plan
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)


def prepare(config: ServeConfig) -> PlannedModel:
    """Find the model that `serve` is to run, read its headers, place it. UserError when that cannot be."""
    model, checkpoint = find_model(config)
    planned = plan_model(model, checkpoint, config, tries_pairs=True)
    return _completed(planned, config)


def plan_found(model: ResolvedModel, checkpoint: Checkpoint, config: ServeConfig, machine: Machine) -> PlannedModel:
    """Place a model that has been found on a machine that is not this one. UserError as `prepare`."""
    check_loadable(checkpoint)
    planned = plan(checkpoint.facts, machine, layout_options(model, config))
    return _completed(PlannedModel(model, checkpoint, planned), config)


def _completed(planned: PlannedModel, config: ServeConfig) -> PlannedModel:
    model = planned.model
    planned = replace(planned, sampling=sampling_defaults(config, model.path, model.format))
    note_missing_tokenizer(model)  # after what may be refused: an error stands alone
    return planned


def find_model(config: ServeConfig) -> tuple[ResolvedModel, Checkpoint]:
    """Find the model of the options, and read its headers. UserError."""
    model = resolve_model(
        config.model,
        part="no weights" if config.load_format == "dummy" else "all",
        report=lambda line: click.echo(line, err=True),
        offline=config.offline,
    )
    return model, read_model(model, config.load_format, config.model_code)


def sampling_defaults(config: ServeConfig, path: str, format: CheckpointFormat) -> SamplingDefaults:
    """Return what a model's files say about sampling, unless the options leave it out. ModelError."""
    if config.generation_config == "none":
        return SamplingDefaults()
    try:
        return read_sampling_defaults(ModelSource(path, format))
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def note_missing_tokenizer(model: ResolvedModel) -> None:
    """Say so if a folder has weights and no tokenizer: its server takes token ids only."""
    folder = Path(model.path)
    if model.format == "safetensors" and has_weights(folder) and not (folder / "tokenizer.json").exists():
        more = " (tokenizer.model is not read; transformers makes tokenizer.json of it)"
        more = more if (folder / "tokenizer.model").exists() else ""
        click.echo(f"{model.path} has no tokenizer.json{more}: only requests with prompt_ids will work", err=True)


def plan_model(
    model: ResolvedModel, checkpoint: Checkpoint, config: ServeConfig, gpus: str = "", tries_pairs: bool = False
) -> PlannedModel:
    """Place a model as the options say, on this machine or the one that ``gpus`` describes. UserError as `prepare`.

    With ``tries_pairs``, peer access between its GPUs is tried if it never was; else what was found before counts.
    """
    check_loadable(checkpoint)
    machine, options = ground(model, config, gpus)
    planned = plan(checkpoint.facts, machine, options)
    is_here = not gpus and not config.nodes
    if is_here and needs_measuring(planned, options):
        machine = measured(machine)
        planned = plan(checkpoint.facts, machine, options)
    if is_here:
        _check_tasks(config, planned)
        found = _with_tried_pairs(machine, planned, tries_pairs)
        planned = planned if found is machine else plan(checkpoint.facts, found, options)
    return PlannedModel(model, checkpoint, planned)


def _with_tried_pairs(machine: Machine, planned: Plan, tries: bool) -> Machine:
    """Return the machine with pairs marked that only seem to be peers; tried are those that the plan uses."""
    record, count = cache_root() / PAIR_RECORD, len(machine.devices)
    used = [device for stage in planned.layout.placement.stages for device in stage.devices]
    ordinals = [device for device in used if device < count]  # CPU workers of a plan come after the GPUs
    if not tries:
        return with_verdicts(machine, read_record(record, machine))
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
    return checked(machine, ordinals, record)


def _check_tasks(config: ServeConfig, planned: Plan) -> None:
    """Raise UserError when so many processes and threads as the server starts are not allowed here."""
    workers, on_cpu = planned.layout.placement.world_size, planned.machine.kind == "cpu"
    threads = usable_cpus(len(os.sched_getaffinity(0))) // workers if on_cpu else 1
    check_task_limit(tasks_of_server(workers, threads, http=config.http != NONE))


def ground(model: ResolvedModel, config: ServeConfig, gpus: str = "") -> tuple[Machine, LayoutOptions]:
    """Return what a plan is made from beside the model. UserError when there is no such machine.

    With ``--nodes`` it is as many hosts like that machine; a server plans with those that join instead.
    """
    options = layout_options(model, config)
    machine = described_machine(gpus) if gpus else _machine(config, options)
    return repeated(machine, config.nodes) if config.nodes else machine, options


def layout_options(model: ResolvedModel, config: ServeConfig) -> LayoutOptions:
    """Return what decides a layout beside model and machine. UserError for an unusable topology file."""
    topology = read_topology(Path(config.topology)) if config.topology else None
    return part_of(config, LayoutOptions, fewer_devices=model.is_demo, topology=topology)


def _machine(config: ServeConfig, options: LayoutOptions) -> Machine:
    """Find the devices for these options. A size or a map also sets the number of CPU workers."""
    workers = config.workers or None
    if workers is None and (config.device == "cpu" or config.oversubscribe):
        workers = implied_workers(options)
    return find_machine(config.device, workers, config.oversubscribe)
