"""Workers that wait for their turn: they serve after a failure, and whatever happens to them hurts nobody."""

import errno
import signal
import sys
from pathlib import Path
from typing import cast

import psutil
import pytest

from harness.servers.server_process import ServerProcess, ready_server
from harness.waiting import eventually
from mgpu.orchestrator.processes.standby import RETRY_S, Standby
from mgpu.orchestrator.processes.worker_group import WorkerGroup

DELAY_S = 5.0


class FakeGroup:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.is_whole = True
        self.calls: list[str] = []
        self.error: OSError | None = None
        """What becomes of an attempt to spawn processes."""

    def park(self) -> None:
        self._spawn("park")

    def wake_up(self) -> None:
        self.calls.append("wake up")

    def start(self, captures_library: bool = True) -> None:
        self._spawn("start")

    def _spawn(self, how: str) -> None:
        self.calls.append(how)
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        self.calls.append("kill")


class Fakes:
    """A standby of fake groups, and its clock."""

    def __init__(self, enabled: bool = True) -> None:
        self.now_s = 100.0
        self.groups: list[FakeGroup] = []
        self.error: OSError | None = None
        self.standby = Standby(self._new_group, enabled, DELAY_S, lambda: self.now_s)

    def _new_group(self, epoch: int) -> WorkerGroup:
        self.groups.append(FakeGroup(epoch))
        self.groups[-1].error = self.error
        return cast(WorkerGroup, self.groups[-1])

    def prepare(self, epoch: int, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.standby.prepare(epoch)


def test_the_next_epoch_waits_a_while_after_the_workers_are_ready_and_is_the_one_that_starts() -> None:
    fakes = Fakes()
    fakes.prepare(1)
    fakes.prepare(1, DELAY_S - 0.1)
    assert not fakes.groups
    fakes.prepare(1, 0.1)
    fakes.prepare(1, 1.0)
    assert fakes.standby.start_group(1) is cast(WorkerGroup, fakes.groups[0])
    assert fakes.groups[0].calls == ["park", "start"]
    fakes.prepare(2, 1.0)
    assert len(fakes.groups) == 1, "the delay counts again"


@pytest.mark.parametrize(("epoch", "whole"), [(1, False), (2, True)])
def test_a_standby_that_lost_a_process_or_is_of_another_epoch_is_not_used(epoch: int, whole: bool) -> None:
    fakes = Fakes()
    fakes.prepare(1)
    fakes.prepare(1, DELAY_S)
    fakes.groups[0].is_whole = whole
    assert fakes.standby.start_group(epoch) is cast(WorkerGroup, fakes.groups[1])
    assert fakes.groups[0].calls == ["park", "kill"]
    assert fakes.groups[1].calls == ["start"]


def test_a_lost_standby_is_replaced_after_a_minute() -> None:
    fakes = Fakes()
    fakes.prepare(1)
    fakes.prepare(1, DELAY_S)
    fakes.groups[0].is_whole = False
    fakes.prepare(1)
    fakes.prepare(1, RETRY_S - 0.1)
    assert [group.calls for group in fakes.groups] == [["park", "kill"]]
    fakes.prepare(1, 0.1)
    assert fakes.groups[1].calls == ["park"]


def test_a_standby_that_cannot_be_spawned_is_tried_again_after_a_minute() -> None:
    fakes = Fakes()
    fakes.error = OSError(errno.EMFILE, "Too many open files")
    fakes.prepare(1)
    fakes.prepare(1, DELAY_S)
    fakes.error = None
    fakes.prepare(1, RETRY_S - 0.1)
    assert [group.calls for group in fakes.groups] == [["park", "kill"]]
    fakes.prepare(1, 0.1)
    assert fakes.groups[1].calls == ["park"]


def test_a_standby_that_is_whole_opens_its_gpus_when_the_workers_fail() -> None:
    fakes = Fakes()
    fakes.standby.wake_up()
    fakes.prepare(1)
    fakes.prepare(1, DELAY_S)
    fakes.standby.wake_up()
    fakes.groups[0].is_whole = False
    fakes.standby.wake_up()
    assert fakes.groups[0].calls == ["park", "wake up"]


def test_nothing_is_left_of_a_group_that_cannot_be_started() -> None:
    fakes = Fakes()
    fakes.error = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OSError, match="Too many open files"):
        fakes.standby.start_group(1)
    assert fakes.groups[0].calls == ["start", "kill"]


def test_without_standby_groups_are_made_when_they_are_needed() -> None:
    fakes = Fakes(enabled=False)
    fakes.prepare(1)
    fakes.prepare(1, 1000.0)
    assert not fakes.groups
    fakes.standby.start_group(1)
    assert fakes.groups[0].calls == ["start"]


def parked(server: ServerProcess) -> set[int]:
    return {
        each.pid for each in server.children_like("harness.servers.fake_worker") if each.cmdline()[-2] == "--standby"
    }


def wait_for_parked(server: ServerProcess, known: set[int]) -> set[int]:
    """Wait until two workers besides the ``known`` ones are parked, and return their ids."""
    eventually(lambda: len(parked(server) - known) >= 2, lambda: server.log)
    return parked(server) - known


@pytest.mark.parametrize("harm", [False, True])
def test_a_real_standby_serves_after_a_kill_and_ends_with_the_server(folder: Path, harm: bool) -> None:
    with ready_server(folder, standby=True, standby_delay_s=0.0, ranks_per_stage=2) as server:
        spares = wait_for_parked(server, set())
        if harm:
            psutil.Process(min(spares)).kill()
        first = {worker.pid for worker in server.workers()} - spares
        psutil.Process(min(first)).kill()
        server.wait_for(lambda: [info.state for info in server.infos][-2:] == ["recovering", "ready"])
        family = server.children_like("harness.servers.fake_worker")
        assert (spares <= {worker.pid for worker in family}) is not harm
        if not harm:
            assert server.log.count("woken up") == 2
        server.serve(0, [1, 2, 3], 5)
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
        assert not any(worker.is_running() for worker in family)


def test_a_server_goes_on_when_a_standby_cannot_be_spawned(folder: Path) -> None:
    command = folder / "worker"
    command.write_text(f"#!/bin/sh\nrm {command}\nexec {sys.executable} -m harness.servers.fake_worker\n")
    command.chmod(0o700)  # there once only: for the workers that serve
    with ready_server(folder, standby=True, standby_delay_s=0.0, worker_command=[str(command)]) as server:
        server.serve(0, [1, 2, 3], 5)
        server.wait_for_log("standby workers cannot be started")
        server.serve(1, [1, 2, 3], 5)
        assert server.finish == {0: "length", 1: "length"}
        assert server.end(signal.SIGTERM) == -signal.SIGTERM
