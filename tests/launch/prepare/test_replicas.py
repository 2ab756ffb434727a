"""Which GPUs and cores copies get, and with which options they are started."""

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from harness.machines import cpus, gpus
from mgpu.launch.prepare import replicas
from mgpu.launch.prepare.planned_model import PlannedModel
from mgpu.launch.prepare.replicas import copy_commands, devices_per_copy, of_one_copy
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.launch.settings.values import ConfigError
from mgpu.orchestrator.placement.machine.devices import Machine


def planned() -> PlannedModel:
    return cast("PlannedModel", SimpleNamespace(model=SimpleNamespace(path="/models/m", name="m")))


def use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "find_machine", lambda *_, **__: machine)


@pytest.mark.parametrize(
    ("flags", "count", "per_copy"),
    [
        ({"replicas": 2}, 8, 4),
        ({"replicas": 3}, 8, 2),
        ({"replicas": 2, "tp": 1}, 8, 1),
        ({"replicas": 4, "device_layers": "0:20;1:12"}, 8, 2),
        ({"replicas": 2, "device_layers": "0+1:16;2+3:16"}, 8, 4),
    ],
)
def test_gpus_are_shared_out(flags: dict[str, Any], count: int, per_copy: int) -> None:
    assert devices_per_copy(ServeConfig(**flags), gpus(*[80.0] * count)) == per_copy


@pytest.mark.parametrize(
    ("flags", "count", "way_out"),
    [({"replicas": 3}, 2, "3 with 1 GPU each need 3, and 2 are visible; use --replicas 2"),
     ({"replicas": 2, "tp": 4}, 4, "2 with 4 GPUs each need 8, and 4 are visible; use --replicas 1")],
)  # fmt: skip
def test_too_few_gpus_are_refused_with_the_number_that_fits(flags: dict[str, Any], count: int, way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        devices_per_copy(ServeConfig(**flags), gpus(*[80.0] * count))


def test_each_copy_sees_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    use(gpus(*[80.0] * 4, selectors=("4", "5", "6", "7")), monkeypatch)
    config, origins = load_config(
        {"model": "m", "replicas": "2", "max_seq_len": "8k", "bind": "tcp://127.0.0.1:1"}, {}, None
    )
    environ = {"PATH": "/bin", "MGPU_BIND": "tcp://127.0.0.1:1", "MGPU_CONFIG": "x", "MGPU_CACHE": "/c"}
    copies = copy_commands(config, origins, planned(), environ)
    assert [copy.env["CUDA_VISIBLE_DEVICES"] for copy in copies] == ["4,5", "6,7"]
    for copy in copies:
        assert {"PATH", "MGPU_CACHE"} <= copy.env.keys()
        assert not copy.env.keys() & {"MGPU_BIND", "MGPU_CONFIG"}
        words = copy.command[copy.command.index("serve") + 1 :]
        assert words == ("--model=/models/m", "--served-name=m", "--http=none", "--max-seq-len=8192")
    assert of_one_copy(config).tp == 2


def test_copies_on_the_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    use(cpus(1), monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    config, origins = load_config({"model": "m", "replicas": "2", "prefix_cache": "false"}, {}, None)
    copies = copy_commands(config, origins, planned(), {})
    assert [sorted(copy.cpus) for copy in copies] == [[0, 2], [1, 3]]
    assert copies[0].command[-1] == "--no-prefix-cache"
    assert of_one_copy(config).tp == 0
