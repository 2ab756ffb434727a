"""Which devices there are: NVML without CUDA, CUDA_VISIBLE_DEVICES in all forms, described machines, CPU workers."""

import subprocess
import sys

import psutil
import pytest

from harness.assertions import assert_has_all
from harness.machines import GIB, FakeGpu, FakeMemory, FakeNvml, cpus, gpus
from mgpu.orchestrator.errors import DeviceError
from mgpu.orchestrator.placement.machine.devices import (
    Machine,
    cpu_machine,
    find_machine,
    oversubscribed,
    worker_environment,
)

UUIDS = ["GPU-aa11-0", "GPU-aa22-1", "GPU-bb33-2", "GPU-cc44-3"]


def four_gpus() -> FakeNvml:
    return FakeNvml(
        [FakeGpu(uuid, f"00000000:{bus}:00.0") for uuid, bus in zip(UUIDS, ("1B", "43", "9A", "DB"), strict=True)]
    )


def found(visible: str | None, nvml: FakeNvml | None = None) -> Machine:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return find_machine(environ=environ, nvml=nvml or four_gpus())


def uuids(machine: Machine) -> list[str]:
    return [device.uuid for device in machine.devices]


def test_all_gpus_are_found_with_their_memory_and_the_session_is_closed() -> None:
    nvml = four_gpus()
    machine = found(None, nvml)
    assert uuids(machine) == UUIDS
    first = machine.devices[0]
    assert (first.ordinal, first.kind, first.name, first.selector) == (0, "cuda", "Test GPU", "0")
    assert (first.total_bytes, first.free_bytes) == (80 * GIB, 79 * GIB)
    assert first.capability == (9, 0)
    assert machine.nccl
    assert nvml.open_sessions == 0


def test_a_capability_that_the_driver_does_not_say_is_not_known() -> None:
    old = FakeNvml([FakeGpu("GPU-old", "00000000:1B:00.0", capability=None)])
    assert found(None, old).devices[0].capability is None


def test_ordinals_follow_the_pci_bus_not_the_order_of_the_driver() -> None:
    nvml = FakeNvml([FakeGpu("GPU-late", "00000000:db:00.0"), FakeGpu("GPU-early", "00000000:1B:00.0")])
    assert uuids(found(None, nvml)) == ["GPU-early", "GPU-late"]
    assert uuids(found("0", nvml)) == ["GPU-early"]


@pytest.mark.parametrize(("visible", "expected"), [
    ("0", [0]), ("1,3", [1, 3]), (" 1 , 3 ", [1, 3]), ("3,1", [1, 3]), ("GPU-bb33-2", [2]), ("GPU-bb", [2]),
    ("gpu-BB", [2]), ("GPU-aa2,GPU-c", [1, 3]), ("2,GPU-aa1", [0, 2]),
])  # fmt: skip
def test_visible_devices_are_chosen_and_keep_the_order_of_the_bus(visible: str, expected: list[int]) -> None:
    machine = found(visible)
    assert uuids(machine) == [UUIDS[index] for index in expected]
    assert [device.ordinal for device in machine.devices] == list(range(len(expected)))
    assert [device.selector for device in machine.devices] == [str(index) for index in expected]
    assert len(machine.links) == len(expected)


def test_a_note_says_which_gpu_is_which_where_the_list_has_another_order() -> None:
    assert found("1,3").notes == ()
    (note,) = found("3,1").notes
    assert "0 is GPU 1, 1 is GPU 3" in note


@pytest.mark.parametrize("visible", ["", "-1", " ", "NoDevFiles"])
def test_hiding_all_gpus_means_the_cpu_and_a_note_says_so(visible: str) -> None:
    machine = found(visible)
    assert machine.kind == "cpu"
    assert len(machine.devices) == 1
    assert "CUDA_VISIBLE_DEVICES" in machine.notes[0]
    assert "CPU" in machine.notes[0]


@pytest.mark.parametrize(("visible", "named"), [
    ("4", "'4'"), ("0,-1", "'-1'"), ("0,,1", "''"), ("0;1", "'0;1'"), ("GPU-zz", "'GPU-zz'"), ("cuda:0", "'cuda:0'"),
    ("MIG-1", "'MIG-1'"), ("0x1", "'0x1'"), ("1.0", "'1.0'"), ("99999999999999999999", "'99999999999999999999'"),
])  # fmt: skip
def test_an_entry_that_names_no_gpu_is_an_error_that_quotes_it(visible: str, named: str) -> None:
    with pytest.raises(DeviceError) as caught:
        found(visible)
    assert_has_all(str(caught.value), named, "0, 1, 2, 3")


def test_an_ambiguous_prefix_is_an_error() -> None:
    with pytest.raises(DeviceError, match="2 devices"):
        found("GPU-aa")


@pytest.mark.parametrize("visible", ["1,1", "0,GPU-aa11", "GPU-bb,GPU-bb33"])
def test_a_gpu_named_twice_is_an_error(visible: str) -> None:
    with pytest.raises(DeviceError, match="twice"):
        found(visible)


def test_without_a_driver_the_cpu_is_used_and_the_reason_told() -> None:
    machine = found(None, FakeNvml([], init_error="NVML Shared Library Not Found"))
    assert machine.kind == "cpu"
    assert "NVML Shared Library Not Found" in machine.notes[0]


def test_without_gpus_the_cpu_is_used() -> None:
    assert found("0", FakeNvml([])).kind == "cpu"


def test_asking_for_cuda_without_a_gpu_is_an_error_with_the_reason() -> None:
    with pytest.raises(DeviceError, match=r"Not Found.*--device cpu"):
        find_machine("cuda", environ={}, nvml=FakeNvml([], init_error="Not Found"))


def test_a_lost_gpu_is_an_error_not_a_smaller_machine() -> None:
    nvml = FakeNvml([FakeGpu("GPU-0", "00:01"), FakeGpu("GPU-1", "00:02", lost=True)])
    with pytest.raises(DeviceError, match="lost"):
        found(None, nvml)
    assert nvml.open_sessions == 0


@pytest.mark.parametrize("visible", ["0,2", "GPU-0,GPU-2"])
def test_a_lost_gpu_that_is_not_visible_leaves_the_others_their_numbers(visible: str) -> None:
    nvml = FakeNvml([FakeGpu(f"GPU-{i}", f"00:0{i}", lost=i == 1) for i in range(3)])
    assert uuids(found(visible, nvml)) == ["GPU-0", "GPU-2"]
    for with_the_lost in ("1", "0,1"):
        with pytest.raises(DeviceError, match="GPU 1: GPU is lost; CUDA_VISIBLE_DEVICES=0,2 leaves it out"):
            found(with_the_lost, nvml)


def test_memory_that_the_driver_does_not_know_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = four_gpus()

    def refuse(_: object) -> FakeMemory:
        raise nvml.NVMLError("Not Supported")

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", refuse)
    assert found(None, nvml).devices[0].total_bytes == psutil.virtual_memory().total


def test_the_cpu_is_used_when_asked_for_whatever_gpus_there_are() -> None:
    machine = find_machine("cpu", 3, environ={}, nvml=four_gpus())
    assert [device.kind for device in machine.devices] == ["cpu"] * 3
    assert not machine.nccl
    assert machine.notes == ()


def test_peer_access_needs_reading_and_writing() -> None:
    p2p = {(UUIDS[0], UUIDS[1], 1): 5, (UUIDS[0], UUIDS[2], 2): 5}
    machine = found("0,1,2", FakeNvml(four_gpus().devices, p2p=p2p))
    assert machine.links[0] == ("self", "none", "pcie")
    assert machine.links[1] == ("nvlink", "self", "nvlink")
    assert not machine.peers(0, 1)
    assert not machine.peers(1, 0)
    assert machine.peers(0, 2)


@pytest.mark.parametrize(("value", "usable"), [("1", False), ("0", True), ("", True), (None, True)])
def test_nccl_can_be_switched_off(value: str | None, usable: bool) -> None:
    environ = {} if value is None else {"MGPU_NO_NCCL": value}
    machine = find_machine(environ=environ, nvml=four_gpus())
    assert machine.nccl is usable
    assert ("MGPU_NO_NCCL=1" in machine.nccl_problem) is not usable


def test_peer_access_can_be_switched_off() -> None:
    machine = find_machine(environ={"MGPU_NO_P2P": "1"}, nvml=four_gpus())
    assert not any(machine.peers(a, b) for a in range(4) for b in range(4))


def mig_machine() -> FakeNvml:
    parts = [FakeGpu(f"MIG-{i}", "01:00", "MIG 1g.10gb", FakeMemory(10 * GIB, 10 * GIB)) for i in range(2)]
    return FakeNvml([FakeGpu("GPU-0", "01:00", mig=parts), FakeGpu("GPU-1", "02:00")])


def test_mig_instances_are_chosen_by_uuid() -> None:
    machine = found("MIG-1", mig_machine())
    assert (machine.devices[0].uuid, machine.devices[0].total_bytes) == ("MIG-1", 10 * GIB)
    assert machine.devices[0].selector == "MIG-1"
    assert uuids(found("0", mig_machine())) == ["MIG-0"]  # the whole GPU cannot be used
    machine = found("MIG-0,MIG-1", mig_machine())
    assert not machine.nccl
    assert machine.links == (("self", "none"), ("none", "self"))


def test_without_a_choice_a_gpu_cut_into_instances_is_left_out() -> None:
    assert uuids(found(None, mig_machine())) == ["GPU-1"]
    only_mig = FakeNvml(mig_machine().devices[:1])
    assert uuids(found(None, only_mig)) == ["MIG-0"]


def test_workers_see_all_gpus_by_uuid_in_one_order() -> None:
    machine = found("3,1")
    for ordinal in range(2):
        environment, device = worker_environment(machine, ordinal)
        assert environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": f"{UUIDS[1]},{UUIDS[3]}"}
        assert device == f"cuda:{ordinal}"


def test_a_worker_on_a_mig_instance_sees_that_one_alone() -> None:
    environment, device = worker_environment(found("MIG-0,MIG-1", mig_machine()), 1)
    assert (environment["CUDA_VISIBLE_DEVICES"], device) == ("MIG-1", "cuda:0")


def test_a_cpu_worker_sees_no_gpu() -> None:
    assert worker_environment(cpus(2), 1) == ({"CUDA_VISIBLE_DEVICES": ""}, "cpu")


def test_oversubscribed_workers_share_memory_and_count_as_peers() -> None:
    machine = oversubscribed(gpus(80, 40), 3)
    assert [device.free_bytes // GIB for device in machine.devices] == [40, 40, 40]
    assert [device.uuid for device in machine.devices] == ["GPU-0000", "GPU-0001", "GPU-0000"]
    assert not machine.nccl
    assert "two ranks" in machine.nccl_problem
    assert machine.peers(0, 2)
    assert [worker_environment(machine, i)[1] for i in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert worker_environment(machine, 2)[0]["CUDA_VISIBLE_DEVICES"] == "GPU-0000,GPU-0001"


def test_oversubscribing_by_fewer_workers_than_gpus_shares_nothing() -> None:
    machine = find_machine("auto", 2, oversubscribe=True, environ={}, nvml=four_gpus())
    assert len(machine.devices) == 2
    assert machine.nccl


def test_workers_without_oversubscribe_must_equal_the_gpus() -> None:
    assert len(find_machine("auto", 4, environ={}, nvml=four_gpus()).devices) == 4
    with pytest.raises(DeviceError, match="--oversubscribe"):
        find_machine("auto", 8, environ={}, nvml=four_gpus())


def test_cpu_workers_divide_the_memory() -> None:
    one, four = cpu_machine(1).devices[0], cpu_machine(4).devices[0]
    assert four.total_bytes == one.total_bytes // 4


@pytest.mark.parametrize("workers", [0, -1, 100_000])
def test_absurd_worker_counts_are_refused(workers: int) -> None:
    with pytest.raises(DeviceError, match="--workers"):
        find_machine("cpu", workers, environ={})


def test_planning_leaves_torch_and_the_driver_unimported() -> None:
    code = (
        "import sys, mgpu.orchestrator.models.find\n"
        "import mgpu.orchestrator.placement.planner, mgpu.orchestrator.placement.reports.table\n"
        "print([name for name in ('torch', 'pynvml', 'numpy', 'tokenizers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
