"""The files for containers name only options, paths and variables that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu.launch.cli import EXIT_USAGE
from mgpu.launch.commands.route import route_command
from mgpu.launch.settings.config import OTHER_VARIABLES, declared_options
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.http.app import PATHS
from mgpu.orchestrator.router.discovery import check_server
from mgpu.orchestrator.router.server import STOP_S

yaml = pytest.importorskip("yaml", reason="PyYAML, which transformers brings along, is not installed")

FOLDER = Path(__file__).parents[1] / "docs" / "deploy"
CONTAINERFILE = (FOLDER / "Containerfile").read_text()
KUBERNETES = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
REPLICAS = list(yaml.safe_load_all((FOLDER / "kubernetes-replicas.yaml").read_text()))
ROUTER_UNIT = (FOLDER / "mgpu-router.service").read_text()
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
FLAGS = {option.flag for option in declared_options()}
ROUTE_FLAGS = {flag for each in route_command.params for flag in each.opts}
DRAIN_S = next(option.default for option in declared_options() if option.field == "drain_timeout_s")


def instruction(name: str) -> list[str]:
    """Return the JSON list of the last instruction of this name."""
    found: list[str] = json.loads(re.findall(rf"^{name} (\[.*\])$", CONTAINERFILE, re.MULTILINE)[-1])
    return found


def container() -> dict[str, object]:
    return container_of("Deployment", KUBERNETES)


def container_of(kind: str, documents: list[Any]) -> dict[str, Any]:
    [found] = pod_of(kind, documents)["containers"]
    assert isinstance(found, dict)
    return found


def pod_of(kind: str, documents: list[Any]) -> dict[str, Any]:
    found = next(each for each in documents if each["kind"] == kind)["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        instruction("ENTRYPOINT") + instruction("CMD"),
        COMPOSE["services"]["mgpu"]["command"],
        container()["args"],
        container_of("StatefulSet", REPLICAS)["args"],
    ],
    ids=["Containerfile", "compose", "kubernetes", "kubernetes-replicas"],
)
def test_every_option_exists(arguments: list[str]) -> None:
    assert {each for each in arguments if each.startswith("--")} <= FLAGS


def test_a_container_listens_beyond_itself_only_with_keys_or_an_explicit_no() -> None:
    assert "0.0.0.0:8000" in instruction("ENTRYPOINT")
    assert "--http-no-auth" in instruction("CMD")
    assert "--http-keys" in COMPOSE["services"]["mgpu"]["command"]
    assert "--http-keys" in str(container()["args"])


def test_every_variable_of_the_image_is_known() -> None:
    known = OTHER_VARIABLES | {option.variable for option in declared_options()}
    assert set(re.findall(r"\bMGPU_[A-Z_]+", CONTAINERFILE)) <= known


def test_probes_ask_for_paths_that_are_served() -> None:
    served = {each.path for each in PATHS}
    probes = [value["httpGet"]["path"] for key, value in container().items() if key.endswith("Probe")]  # type: ignore[index]
    assert len(probes) == 3
    assert set(probes) <= served
    assert "/health" in served


def test_a_server_has_time_to_drain_before_it_is_killed() -> None:
    deployment = next(each for each in KUBERNETES if each["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
    assert int(COMPOSE["services"]["mgpu"]["stop_grace_period"].removesuffix("s")) > DRAIN_S


def test_the_servers_of_a_router_are_found_by_the_name_and_port_of_their_service() -> None:
    server, router = container_of("StatefulSet", REPLICAS), container_of("Deployment", REPLICAS)
    assert router["command"] == ["mgpu-launch", "route"]
    assert {each for each in router["args"] if each.startswith("--")} <= ROUTE_FLAGS
    [service] = [each for each in REPLICAS if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None"]
    [port] = service["spec"]["ports"]
    [line] = [each for each in router["args"] if each.startswith("dns://")]
    assert line == f"dns://{service['metadata']['name']}:{port['port']}"
    check_server(line)
    assert f"tcp://*:{port['port']}" in server["args"]
    selected = service["spec"]["selector"].items()
    [servers] = [each for each in REPLICAS if each["kind"] == "StatefulSet"]
    assert selected <= servers["spec"]["template"]["metadata"]["labels"].items()
    assert servers["spec"]["serviceName"] == service["metadata"]["name"]


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_pods_behind_a_router_have_what_they_mount_and_time_to_drain(kind: str) -> None:
    pod, served = pod_of(kind, REPLICAS), {each.path for each in PATHS}
    [found] = pod["containers"]
    volumes = {each["name"] for each in pod["volumes"]}
    if kind == "StatefulSet":
        [servers] = [each for each in REPLICAS if each["kind"] == kind]
        volumes |= {each["metadata"]["name"] for each in servers["spec"]["volumeClaimTemplates"]}
    mounted = [mount["name"] for each in (found, *pod["initContainers"]) for mount in each["volumeMounts"]]
    assert set(mounted) == volumes
    assert {value["httpGet"]["path"] for key, value in found.items() if key.endswith("Probe")} <= served
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    assert found["securityContext"]["readOnlyRootFilesystem"]


def test_the_unit_of_a_router_has_options_that_exist_and_systemd_takes_it(tmp_path: Path) -> None:
    [command] = re.findall(r"^ExecStart=(.*)$", ROUTER_UNIT, re.MULTILINE)
    assert {word for word in command.split() if word.startswith("--")} <= ROUTE_FLAGS
    assert command.split()[1] == "route"
    [stop_s] = re.findall(r"^TimeoutStopSec=(\d+)$", ROUTER_UNIT, re.MULTILINE)
    drain_s = next(each.default for each in route_command.params if each.name == "drain_timeout")
    assert int(stop_s) > drain_s + STOP_S
    statuses = re.findall(r"^RestartPreventExitStatus=(.*)$", ROUTER_UNIT, re.MULTILINE)
    assert statuses == [f"{EXIT_USAGE} {UserError.exit_code}"]
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is missing")
    unit = tmp_path / "mgpu-router.service"
    unit.write_text(ROUTER_UNIT.replace("/usr/bin/mgpu-launch", "/bin/true"))
    done = subprocess.run([tool, "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
