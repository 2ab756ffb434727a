"""Sums of NCCL in CUDA graphs that hang: the workers of the next epoch have no such graphs, and the server lives."""

from pathlib import Path

from harness.servers.fake_model import solo_tokens
from harness.servers.server_process import ready_server, running_server

WITHOUT = "from now on sums of NCCL are not part of CUDA graphs"
BY_NCCL = {"ranks_per_stage": 2, "device_kind": "cuda", "standby": False, "transport": "nccl"}


def test_steps_that_hang_go_on_without_captured_sums(folder: Path) -> None:
    options = {"fail": "hang", "fail_phase": "steps", "fail_step": 6, "fail_captured": True}
    with ready_server(folder, options, hang_timeout_s=1.0, **BY_NCCL) as server:
        server.serve(0, [1, 2, 3], 20)
        assert server.tokens[0] == solo_tokens([1, 2, 3], 20)
        assert server.counters()["restarts"] == 1
        assert "the workers hang: no result of a step" in server.log
        assert WITHOUT in server.log


def test_a_start_whose_trial_of_captured_sums_hangs_is_made_again_without_them(folder: Path) -> None:
    options = {"fail": "capture", "fail_phase": "rendezvous", "fail_captured": True}
    with ready_server(folder, options, **BY_NCCL) as server:
        server.serve(0, [1, 2, 3], 5)
        assert server.counters()["restarts"] == 1
        assert server.log.count(WITHOUT) == 1


def test_a_start_that_fails_without_captured_sums_too_ends_the_server(folder: Path) -> None:
    options = {"fail": "capture", "fail_phase": "rendezvous"}
    with running_server(folder, options, **BY_NCCL) as server:
        assert server.wait_exit() == 1
        assert server.log.count(WITHOUT) == 1
        assert "rank 0 was told to fail" in server.log


def test_workers_without_nccl_that_hang_have_nothing_to_avoid(folder: Path) -> None:
    options = {"fail": "hang", "fail_phase": "steps", "fail_step": 6, "fail_epochs": [0]}
    with ready_server(folder, options, hang_timeout_s=1.0) as server:
        server.serve(0, [1, 2, 3], 20)
        assert server.counters()["restarts"] == 1
        assert WITHOUT not in server.log
