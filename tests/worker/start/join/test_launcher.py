"""The environments of torchrun, srun and a Kubernetes StatefulSet, and what is wrong with others."""

import pytest

from mgpu.worker.start.join.launcher import Launched, LauncherError, read_launcher

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29400", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "node[0-1]", "SLURM_JOB_ID": "77",
}  # fmt: skip
POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOSTNAME": "workers-3", "WORLD_SIZE": "4",
    "MASTER_ADDR": "workers-0.workers.default.svc.cluster.local", "MASTER_PORT": "29500",
}  # fmt: skip


def test_torchrun_says_everything() -> None:
    assert read_launcher(TORCHRUN, "node1") == Launched(5, 8, 1, 4, "1", "node0:29400")


def test_srun_has_names_of_its_own_and_no_address_where_ranks_meet() -> None:
    assert read_launcher(SRUN, "node1") == Launched(5, 8, 1, 4, "1", "")
    with_address = read_launcher(SRUN | {"MASTER_ADDR": "node0"}, "node1")
    assert with_address.master == "node0:29500"


def test_a_pod_of_a_stateful_set_has_its_rank_in_its_name() -> None:
    found = read_launcher(POD, "workers-3")
    assert found == Launched(3, 4, 0, 1, "workers-3", "workers-0.workers.default.svc.cluster.local:29500")


def test_names_of_torchrun_go_before_those_of_srun() -> None:
    assert read_launcher(SRUN | TORCHRUN | {"RANK": "6"}, "node1").rank == 6


def test_a_host_name_with_a_number_is_no_rank_outside_kubernetes() -> None:
    with pytest.raises(LauncherError, match="RANK is not set: start this command by torchrun, srun or a StatefulSet"):
        read_launcher({"WORLD_SIZE": "4"}, "gpu-3")


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is out of range: WORLD_SIZE=2 has ranks 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 is out of range"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: it must be between 1 and 4096"),
        ({"RANK": "0", "WORLD_SIZE": "99999999"}, "WORLD_SIZE=99999999: it must be between"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is out of range"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000: a port is"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environ: dict[str, str], says: str) -> None:
    with pytest.raises(LauncherError) as caught:
        read_launcher(environ, "host")
    assert says in str(caught.value)
