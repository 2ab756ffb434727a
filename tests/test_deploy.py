"""The files for containers name only options, paths and variables that exist."""

import json
import re
from pathlib import Path

import pytest

from mgpu.launch.settings.config import OTHER_VARIABLES, declared_options
from mgpu.orchestrator.http.app import PATHS

yaml = pytest.importorskip("yaml", reason="PyYAML, which transformers brings along, is not installed")

FOLDER = Path(__file__).parents[1] / "docs" / "deploy"
CONTAINERFILE = (FOLDER / "Containerfile").read_text()
KUBERNETES = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
FLAGS = {option.flag for option in declared_options()}
DRAIN_S = next(option.default for option in declared_options() if option.field == "drain_timeout_s")


def instruction(name: str) -> list[str]:
    """Return the JSON list of the last instruction of this name."""
    found: list[str] = json.loads(re.findall(rf"^{name} (\[.*\])$", CONTAINERFILE, re.MULTILINE)[-1])
    return found


def container() -> dict[str, object]:
    deployment = next(each for each in KUBERNETES if each["kind"] == "Deployment")
    [found] = deployment["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        instruction("ENTRYPOINT") + instruction("CMD"),
        COMPOSE["services"]["mgpu"]["command"],
        container()["args"],
    ],
    ids=["Containerfile", "compose", "kubernetes"],
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
