"""Busy GPUs are measured before layers are divided automatically, and only then."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.machines import QWEN3_32B, gpus
from mgpu.launch.prepare import planned_model as planning
from mgpu.launch.prepare.measured import measured, needs_measuring
from mgpu.launch.settings.config import ServeConfig
from mgpu.orchestrator.placement.machine.pair_check import HANGS
from mgpu.orchestrator.placement.planner import LayoutOptions, plan


def answering(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", f"print({text!r})"


def test_only_an_automatic_map_over_a_busy_gpu_needs_measuring() -> None:
    idle = gpus(80, 80, nccl=False)
    busy = replace(idle, devices=(idle.devices[0], replace(idle.devices[1], busy=0.5)))
    by_hand = LayoutOptions(device_layers="0:32;1:32")
    assert needs_measuring(plan(QWEN3_32B, busy, LayoutOptions()), LayoutOptions())
    assert not needs_measuring(plan(QWEN3_32B, idle, LayoutOptions()), LayoutOptions())
    assert not needs_measuring(plan(QWEN3_32B, busy, by_hand), by_hand)
    whole = replace(busy, nccl_problem="")
    assert not needs_measuring(plan(QWEN3_32B, whole, LayoutOptions()), LayoutOptions())


def test_what_was_measured_counts_also_beside_a_broken_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = gpus(80, 80, nccl=False)
    busy = replace(idle, devices=(idle.devices[0], replace(idle.devices[1], busy=0.5)))
    monkeypatch.setattr(planning, "ground", lambda *_: (busy, LayoutOptions()))
    monkeypatch.setattr(planning, "check_loadable", lambda _: None)
    monkeypatch.setattr(planning, "measured", lambda machine: measured(machine, answering('{"0": 4e12, "1": 1e12}')))
    monkeypatch.setattr(planning, "read_record", lambda *_: {(0, 1): HANGS})
    checkpoint: Any = SimpleNamespace(facts=QWEN3_32B)
    found = planning.plan_model(checkpoint, checkpoint, ServeConfig(model="")).plan
    assert [device.speed for device in found.machine.devices] == [1.0, 0.25]
    assert not found.machine.peers(0, 1)


def test_speeds_are_shares_of_the_fastest_gpu_of_a_kind_or_of_what_is_known() -> None:
    found = measured(gpus(80, 80), answering('{"0": 3e12, "1": 1.5e12}'))
    assert [device.speed for device in found.devices] == [1.0, 0.5]
    known = gpus(80, 80)
    known = replace(known, devices=tuple(replace(each, name="NVIDIA H200") for each in known.devices))
    found = measured(known, answering('{"0": 2.15e12, "1": 4.4e12}'))
    assert [device.speed for device in found.devices] == [pytest.approx(0.5, rel=0.01), 1.0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"0": null}', '{"7": 1e12}', '{"x": 1}'])
def test_an_answer_that_cannot_be_used_changes_nothing(text: str) -> None:
    machine = gpus(80, 80)
    assert measured(machine, answering(text)) == machine


def test_a_probe_that_fails_changes_nothing() -> None:
    machine = gpus(80, 80)
    assert measured(machine, (sys.executable, "-c", "raise SystemExit(1)")) == machine
    assert measured(machine, ("/nowhere/probe",)) == machine


def test_a_late_probe_is_killed_and_a_file_that_it_holds_open_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a probe that hangs in the driver does: its standard output stays open."""
    monkeypatch.setattr("mgpu.launch.prepare.measured._DEADLINE_S", 1.0)
    machine, holder = gpus(80, 80), tmp_path / "pid"
    began_s = time.monotonic()
    try:
        assert measured(machine, ("sh", "-c", f"sleep 60 & echo $! > {holder}; wait")) == machine
        assert time.monotonic() - began_s < 40
    finally:
        os.kill(int(holder.read_text()), signal.SIGKILL)
    assert "the speed of busy GPUs is not known" in caplog.text
