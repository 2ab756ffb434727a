"""The files for several hosts name only options that exist, and their numbers and names fit together."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu.launch.settings.config import declared_options
from mgpu.worker.start.join.launcher import read_launcher
from mgpu.worker.start.join.options import add_options

yaml = pytest.importorskip("yaml", reason="PyYAML, which transformers brings along, is not installed")

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "several-hosts.md").read_text()
BATCH = DOCS / "deploy" / "several-hosts.sbatch"
MANIFEST = list(yaml.safe_load_all((DOCS / "deploy" / "kubernetes-hosts.yaml").read_text()))
FLAGS = {option.flag for option in declared_options()}


def of_kind(kind: str, name: str) -> Any:
    return next(each for each in MANIFEST if each["kind"] == kind and each["metadata"]["name"] == name)


def container(kind: str, name: str) -> Any:
    [found] = of_kind(kind, name)["spec"]["template"]["spec"]["containers"]
    return found


def worker_options(words: list[str]) -> argparse.Namespace:
    """Parse what follows ``python -m mgpu.worker``; a word that is no option fails the test."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return parser.parse_args(words)


def commands(text: str) -> list[list[str]]:
    """Return the commands of a script, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [shlex.split(line, comments=True) for line in joined.splitlines() if "mgpu" in line.partition("#")[0]]


def test_head_and_workers_of_the_manifest_agree() -> None:
    head, worker = container("Deployment", "mgpu-head"), container("StatefulSet", "mgpu-workers")
    assert {word for word in head["args"] if word.startswith("--")} <= FLAGS
    options = worker_options(worker["args"])
    [join] = [port["port"] for port in of_kind("Service", "mgpu-head")["spec"]["ports"] if port["name"] == "join"]
    assert options.join == f"tcp://mgpu-head:{join}"
    assert f"tcp://*:{join}" in head["args"]
    replicas = of_kind("StatefulSet", "mgpu-workers")["spec"]["replicas"]
    env = {each["name"]: each["value"] for each in worker["env"]} | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert head["args"][head["args"].index("--nodes") + 1] == str(replicas) == env["WORLD_SIZE"]
    launched = [read_launcher(env, f"mgpu-workers-{at}") for at in range(replicas)]
    assert [each.rank for each in launched] == [*range(replicas)]
    assert {each.master for each in launched} == {"mgpu-workers-0.mgpu-workers:29500"}
    assert len({each.node for each in launched}) == replicas


def test_pods_mount_what_they_have_and_find_each_other_before_they_are_ready() -> None:
    for kind, name in (("Deployment", "mgpu-head"), ("StatefulSet", "mgpu-workers")):
        pod = of_kind(kind, name)["spec"]["template"]
        spec = pod["spec"]
        containers = (*spec["containers"], *spec["initContainers"])
        mounted = {mount["name"] for each in containers for mount in each["volumeMounts"]}
        assert mounted == {each["name"] for each in spec["volumes"]}
        service = of_kind("Service", name)["spec"]
        assert service["publishNotReadyAddresses"]
        assert service["selector"].items() <= pod["metadata"]["labels"].items()


def test_the_batch_file_is_a_script_whose_options_exist() -> None:
    subprocess.run(["bash", "-n", BATCH], check=True)
    serve, srun = commands(BATCH.read_text())
    assert serve[:2] == ["mgpu-launch", "serve"]
    assert {word for word in serve if word.startswith("--")} <= FLAGS
    options = worker_options(srun[srun.index("mgpu.worker") + 1 :])
    assert options.join == "tcp://$MASTER_ADDR:5570"
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", BATCH.read_text(), re.MULTILINE))
    ranks = int(settings["nodes"]) * int(settings["ntasks-per-node"])
    layers = serve[serve.index("--device-layers") + 1]
    assert sorted(map(int, re.findall(r"\d+(?=[+:])", layers))) == [*range(ranks)]


def test_the_commands_of_the_page_are_those_of_torchrun_and_of_a_worker() -> None:
    from torch.distributed.run import get_args_parser

    blocks = "\n".join(re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    [command] = [each for each in commands(blocks) if each[0] == "torchrun"]
    parsed = get_args_parser().parse_args(command[1:])
    assert (parsed.nnodes, parsed.module, parsed.training_script) == ("2", True, "mgpu.worker")
    assert worker_options(parsed.training_script_args).keys == "hosts.worker"
