"""The server that is measured: its model and options, from what the user typed, and the server while it is asked."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mgpu.launch.bench.limit import Limit, limit_of, machine_read_speed, parse_bandwidth
from mgpu.launch.bench.options import Wanted
from mgpu.launch.bench.probe import Probe
from mgpu.launch.bench.shapes import SHAPES, write_config
from mgpu.launch.prepare.planned_model import prepare
from mgpu.launch.server_process import ServerDied, ServerProcess
from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.options import read_config
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.devices import find_machine
from mgpu.orchestrator.placement.planner import Plan
from mgpu.protocol.checkpoint.read import has_weights
from mgpu.protocol.client.client import Client
from mgpu.protocol.errors import MgpuError

READY_S = 900.0
"""Longest wait for a server: a large model from a cold disk."""
TIMEOUT_S = 900.0
"""Longest time that an answer may take."""
SILENCE_S = 60.0
"""Longest silence of a server that is under more load than its clients would put on it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server that can be started: its command and what is known of it beforehand."""

    name: str
    arguments: tuple[str, ...]
    """Of ``mgpu-launch serve``."""
    config: ServeConfig
    plan: Plan
    limit: Limit
    files: tuple[Path, ...]
    """What the weights are read from; none for random ones."""

    @property
    def facts(self) -> dict[str, object]:
        """Return the facts that are saved beside the numbers."""
        return {
            "model": self.name,
            "dtype": self.plan.layout.dtype,
            "kv_cache_dtype": self.plan.layout.kv_cache_dtype,
            "layout": f"{self.plan.mode}, {self.plan.layout.placement.world_size} x {self.plan.machine.kind}",
            "serve_options": [_without_folder(word) for word in self.arguments],
            "bandwidth_bytes_per_s": self.limit.bytes_per_s or None,
            "weight_bytes": self.limit.weight_bytes,
            "kv_token_bytes": self.limit.kv_token_bytes,
        }

    def start(self, **settings: Any) -> ServerProcess:
        """Start the server; settings are `ServerProcess`'s."""
        return ServerProcess(*self.arguments, **settings)


def _without_folder(word: str) -> str:
    """Leave a path's last part: where this machine keeps a model says nothing about what was measured."""
    return Path(word).name if Path(word).is_absolute() else word


@contextlib.contextmanager
def prepared(wanted: Wanted) -> Iterator[Target]:
    """Find, read and place what is to be served; nothing is started. UserError as `serve` would raise it."""
    if wanted.model and wanted.shape:
        raise UserError(f"-m {wanted.model} and --shape {wanted.shape} contradict each other; drop one of them")
    with tempfile.TemporaryDirectory(prefix="mgpu-bench-") as folder:
        name, arguments = _model(wanted, Path(folder))
        command = (*arguments, *wanted.serve_options)
        config = serve_config(command)
        planned = prepare(config)
        kind = planned.plan.machine.kind
        speed = parse_bandwidth(wanted.bandwidth) if wanted.bandwidth else 0.0
        if kind == "cpu" and not speed:
            speed = machine_read_speed()
            click.echo(f"memory is read at {speed / 1e9:.1f} GB/s", err=True)
        files = {Path(tensor.file) for tensor in planned.checkpoint.tensors.values() if tensor.file}
        limit = limit_of(planned.plan, speed)
        yield Target(name or planned.model.name, command, config, planned.plan, limit, tuple(sorted(files)))


def _model(wanted: Wanted, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return a name ("": the model's own) and the first options of serve."""
    if wanted.model:
        path = Path(wanted.model).expanduser()
        is_bare = path.is_dir() and not has_weights(path)
        return "", ("-m", wanted.model, *(("--load-format", "dummy") if is_bare else ()))
    config = serve_config(("-m", "none", *wanted.serve_options))
    shape = wanted.shape or ("8B" if find_machine(config.device).kind == "cuda" else "tiny")
    model = write_config(folder / shape, SHAPES[shape])
    return f"{shape} (random weights)", ("-m", str(model), "--load-format", "dummy")


def serve_config(arguments: tuple[str, ...]) -> ServeConfig:
    """Read options as `serve` does. UserError or click's UsageError for what it would refuse."""
    from mgpu.launch.commands.serve import serve_command

    flags = serve_command.make_context("serve", list(arguments)).params
    return read_config(flags.pop("config_file"), flags)[0]


@contextlib.contextmanager
def started(target: Target, **settings: Any) -> Iterator[ServerProcess]:
    """Run the target's server inside the block; see `Target.start`. UserError when it fails."""
    try:
        with target.start(**settings) as server:
            yield server
    except ServerDied as error:
        raise UserError(f"the server to measure failed: {error}") from error


@contextlib.contextmanager
def serving(target: Target) -> Iterator[str]:
    """Run the target's server inside the block and yield its endpoint. UserError when it fails, then or later."""
    try:
        with started(target) as server:
            yield server.wait_ready(READY_S)
    except MgpuError as error:
        raise UserError(f"the server to measure did not answer as it should: {error}") from error


@contextlib.contextmanager
def probing(target: Target) -> Iterator[Probe]:
    """Run the target's server inside the block and yield a probe of it. UserError as `serving`."""
    with serving(target) as endpoint, Client(endpoint, timeout_s=TIMEOUT_S, silence_timeout_s=SILENCE_S) as client:
        yield Probe(client, target.plan.facts.vocab_size)
