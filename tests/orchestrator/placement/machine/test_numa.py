"""The processors next to a GPU, on imitated machines of one and two sockets."""

from pathlib import Path

import pytest

from mgpu.orchestrator.placement.machine.numa import cpus_of_node, numa_node, read_cpus


def imitate(system: Path, nodes: dict[int, str], devices: dict[str, str]) -> Path:
    for node, cpus in nodes.items():
        folder = system / "devices/system/node" / f"node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    for address, node in devices.items():
        folder = system / "bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node + "\n")
    return system


def test_a_gpu_has_the_processors_of_its_socket(tmp_path: Path) -> None:
    system = imitate(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15"}, {"0000:17:00.0": "0", "0001:9a:00.0": "1"})
    assert cpus_of_node(numa_node("00000000:17:00.0", system), system) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert cpus_of_node(numa_node("00000001:9A:00.0", system), system) == {4, 5, 6, 7, 12, 13, 14, 15}


@pytest.mark.parametrize("bus_id", ["", "00000000:17:00.0", "lost-0", "../../x", "00000000:18:00.0"])
def test_what_is_not_known_binds_nothing(tmp_path: Path, bus_id: str) -> None:
    system = imitate(tmp_path, {0: "0-3", 1: "4-7"}, {"0000:17:00.0": "-1", "0000:18:00.0": "x"})
    assert numa_node(bus_id, system) == -1
    assert cpus_of_node(-1, system) == frozenset()


def test_one_socket_or_a_broken_list_binds_nothing(tmp_path: Path) -> None:
    assert cpus_of_node(0, imitate(tmp_path / "one", {0: "0-63"}, {})) == frozenset()
    assert cpus_of_node(1, imitate(tmp_path / "odd", {0: "0-3", 1: "four"}, {})) == frozenset()
    assert cpus_of_node(7, tmp_path / "odd") == frozenset()
    assert read_cpus("0-2,5\n") == [0, 1, 2, 5]
