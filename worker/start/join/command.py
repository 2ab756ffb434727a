"""``python -m mgpu.worker --join``: what a launcher starts on every host, once for each rank."""

import argparse
import os
import secrets
import socket
import sys
from pathlib import Path

import mgpu
from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.checkpoint.fingerprint import model_print
from mgpu.protocol.internal.host_messages import Hello
from mgpu.protocol.internal.process.commit import commit_of
from mgpu.protocol.internal.process.logs import configure_logging
from mgpu.protocol.keys import ClientKeys, KeyFileError, find_client_keys
from mgpu.worker.start.join.agent import EXIT_CONFIG, Agent, host_of
from mgpu.worker.start.join.child import WORKER_COMMAND, Here
from mgpu.worker.start.join.device import NoDevice, find_device
from mgpu.worker.start.join.launcher import LauncherError, read_launcher
from mgpu.worker.start.join.network import own_address


class JoinError(Exception):
    """The options are wrong; the text says what to type instead."""


def run_joined(options: argparse.Namespace, command: tuple[str, ...] = WORKER_COMMAND) -> int:
    """Join, and run workers by ``command`` until the server ends. Return the exit status."""
    host = socket.gethostname()
    configure_logging(f"host {host}")
    try:
        agent = _agent(options, host, command)
    except (JoinError, LauncherError, NoDevice, KeyFileError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    return agent.run()


def _agent(options: argparse.Namespace, host: str, command: tuple[str, ...]) -> Agent:
    place, port = _checked_endpoint(options.join)
    keys = _keys(options.keys)
    launched = read_launcher(os.environ, host)
    if not 1 <= options.join_timeout <= 86400:
        raise JoinError(f"--join-timeout {options.join_timeout:g}: it must be between 1 and 86400 seconds")
    model = model_print(_model_path(options.model))
    device, name = find_device(options.device, launched.local_rank, launched.local_world_size)
    hello = Hello(
        rank=launched.rank,
        world_size=launched.world_size,
        local_rank=launched.local_rank,
        node=launched.node,
        host=host,
        pid=os.getpid(),
        incarnation=secrets.token_bytes(8),
        version=mgpu.__version__,
        commit=commit_of(Path(mgpu.__file__).parent),
        model=model,
        device=device,
        master=launched.master,
        address=own_address(place, port),
    )
    return Agent(hello, Here(launched, model.path, name), keys, options.join, options.join_timeout, command)


def _checked_endpoint(endpoint: str) -> tuple[str, int]:
    host, port = host_of(endpoint), endpoint.rpartition(":")[2]
    if not endpoint.startswith("tcp://") or not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise JoinError(f"--join {endpoint}: write tcp://HEAD:PORT, the address of --join of `mgpu-launch serve`")
    if host in ("*", "0.0.0.0", "::"):
        raise JoinError(f"--join {endpoint}: {host} means all addresses of a host; name the head's own")
    return host, int(port)


def _keys(file: str | None) -> ClientKeys:
    keys = find_client_keys(file)
    if keys is None:
        raise JoinError(
            "--keys FILE is missing: the key file of this host. On the head: mgpu-launch keygen --worker NAME, then "
            "copy NAME.worker here"
        )
    return keys


def _model_path(model: str | None) -> str:
    if not model:
        raise JoinError("-m MODEL is missing: the model's folder or .gguf file on this host")
    path = Path(model).expanduser()
    if not path.exists():
        raise JoinError(
            f"-m {model}: no such file or folder on this host; a worker that joins fetches nothing, so name where the "
            "model's files lie here"
        )
    return str(path.absolute())
