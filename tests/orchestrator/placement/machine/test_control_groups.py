"""Limits of control groups, from imitated files: both versions, at the group itself and above it."""

from pathlib import Path

import pytest

from mgpu.orchestrator.placement.machine.control_groups import (
    cpu_quota,
    memory_within_limits,
    tasks_limits,
    usable_cpus,
)

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712
V2_MOUNT = "30 20 0:26 {inside} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "34 31 0:31 {inside} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {inside} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root: Path, own: str, mounts: str, inside: str = "/") -> Path:
    write(root / "proc/self/cgroup", own)
    write(root / "proc/self/mountinfo", mounts.format(inside=inside))
    return root / "sys/fs/cgroup"


def memory_v2(group: Path, limit: str, used: int, file_pages: int = 0, shared: int = 0) -> None:
    write(group / "memory.max", f"{limit}\n")
    write(group / "memory.current", f"{used}\n")
    stat = f"anon 1\nfile {file_pages + shared}\nshmem {shared}\ninactive_file {file_pages}\nactive_file 0\n"
    write(group / "memory.stat", stat)


def memory_v1(group: Path, limit: int, used: int, file_pages: int = 0) -> None:
    write(group / "memory.limit_in_bytes", f"{limit}\n")
    write(group / "memory.usage_in_bytes", f"{used}\n")
    write(group / "memory.stat", f"total_inactive_file 0\ntotal_active_file {file_pages}\n")


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (64 * GIB, 40 * GIB)
    assert cpu_quota(tmp_path) is None
    assert usable_cpus(8, tmp_path) == 8


def test_file_pages_do_not_count_as_used_but_shared_memory_does(tmp_path: Path) -> None:
    memory_v2(machine(tmp_path, "0::/\n", V2_MOUNT), str(8 * GIB), 7 * GIB, file_pages=5 * GIB, shared=GIB)
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (8 * GIB, 6 * GIB)


def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    top = machine(tmp_path, "0::/system.slice/mgpu.service/inner\n", V2_MOUNT)
    memory_v2(top / "system.slice", str(32 * GIB), 30 * GIB)
    memory_v2(top / "system.slice/mgpu.service", str(16 * GIB), GIB)
    memory_v2(top / "system.slice/mgpu.service/inner", "max", GIB)
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (16 * GIB, 2 * GIB)


@pytest.mark.parametrize("inside", ["/", "/docker/abc"])
def test_limits_of_version_1(tmp_path: Path, inside: str) -> None:
    own = "5:memory:/docker/abc/x\n4:cpu,cpuacct:/docker/abc/x\n0::/docker/abc/x\n"
    top = machine(tmp_path, own, V1_MOUNTS, inside)
    container = top / "memory" / ("docker/abc" if inside == "/" else ".")
    memory_v1(container, 4 * GIB, 3 * GIB, file_pages=2 * GIB)
    memory_v1(container / "x", NO_LIMIT_V1, GIB)
    cpu = top / "cpu,cpuacct" / ("docker/abc" if inside == "/" else ".") / "x"
    write(cpu / "cpu.cfs_quota_us", "150000\n")
    write(cpu / "cpu.cfs_period_us", "100000\n")
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (4 * GIB, 3 * GIB)
    assert cpu_quota(tmp_path) == 1.5


def test_a_group_outside_of_the_mounted_ones_is_read_at_the_mount(tmp_path: Path) -> None:
    memory_v2(machine(tmp_path, "0::/../other\n", V2_MOUNT), str(2 * GIB), GIB)
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (2 * GIB, GIB)


def test_a_group_that_uses_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    memory_v2(machine(tmp_path, "0::/\n", V2_MOUNT), str(GIB), 2 * GIB)
    assert memory_within_limits(64 * GIB, 40 * GIB, tmp_path) == (GIB, 0)


@pytest.mark.parametrize(("quota", "affinity", "threads"), [
    ("60000 100000", 2, 1), ("250000 100000", 8, 2), ("max 100000", 8, 8), ("1600000 100000", 8, 8), ("5 0", 8, 8),
    ("nonsense", 3, 3), ("", 3, 3),
])  # fmt: skip
def test_threads_follow_affinity_and_quota(tmp_path: Path, quota: str, affinity: int, threads: int) -> None:
    write(machine(tmp_path, "0::/a/b\n", V2_MOUNT) / "a/cpu.max", f"{quota}\n")
    assert usable_cpus(affinity, tmp_path) == threads


def test_limits_of_processes_count_at_every_group(tmp_path: Path) -> None:
    mount = machine(tmp_path, "0::/a/b\n", V2_MOUNT)
    for group, limit, used in (("a", "max", 7), ("a/b", "64", 5)):
        write(mount / group / "pids.max", f"{limit}\n")
        write(mount / group / "pids.current", f"{used}\n")
    assert tasks_limits(tmp_path) == [(64, 5)]


def test_limits_of_processes_are_read_in_version_1(tmp_path: Path) -> None:
    mounts = "36 31 0:33 {inside} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
    mount = machine(tmp_path, "8:pids:/docker/x\n", mounts, "/docker/x")
    write(mount / "pids" / "pids.max", "100\n")
    write(mount / "pids" / "pids.current", "3\n")
    assert tasks_limits(tmp_path) == [(100, 3)]
