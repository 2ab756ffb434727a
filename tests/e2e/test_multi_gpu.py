"""Tensor parallelism over real GPUs, and over workers that share one: the tokens of one GPU, whoever adds up."""

import pytest

from mgpu import Client
from mgpu.launch.server_process import ServerProcess
from mgpu.orchestrator.placement.machine.devices import find_machine

PROMPTS = [[1 + (37 * i + 11 * n) % 97 for i in range(length)] for n, length in enumerate((3, 20, 65, 200))]
DRAWN = {"temperature": 0.9, "seed": 5}
FILTERED = {"temperature": 0.9, "seed": 5, "top_p": 0.8, "logprobs": 2}
FP32 = ("--dtype", "float32", "--kv-memory", "64MiB")
KERNELS = "tokens go by own kernels"
NO_KERNELS = "do not go by own kernels"

MACHINE = find_machine("auto")
GPUS = 0 if MACHINE.kind == "cpu" else len(MACHINE.devices)
needs_a_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")


def served(*arguments: str, says: str = "", environ: dict[str, str] | None = None) -> list[list[int]]:
    """Serve a model; give greedy, drawn and filtered continuations of all prompts, asked at once."""
    with ServerProcess(*arguments, *FP32, environ=environ) as server, Client(server.wait_ready()) as client:
        assert says in server.output(), server.output()
        streams = [
            client.stream(ids, max_tokens=16, ignore_eos=True, **options)
            for ids in PROMPTS
            for options in ({}, DRAWN, FILTERED)
        ]
        return [list(stream.completion().token_ids) for stream in streams]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from harness.models.random_model import write_random_model

    return str(write_random_model(tmp_path_factory.mktemp("random")))


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[int]]:
    return served("-m", folder, "--tp", "1")


@pytest.mark.parametrize(
    ("environ", "says"),
    [({}, KERNELS), ({"MGPU_PEER_REDUCE": "0"}, NO_KERNELS), ({"MGPU_NO_NCCL": "1"}, KERNELS)],
    ids=["kernels", "NCCL", "kernels without NCCL"],
)
@pytest.mark.multigpu
@needs_two_gpus
def test_two_gpus_give_the_tokens_of_one(
    folder: str, expected: list[list[int]], environ: dict[str, str], says: str
) -> None:
    assert served("-m", folder, "--tp", "2", says=says, environ=environ) == expected


@pytest.mark.gpu
@needs_a_gpu
def test_workers_that_share_a_gpu_give_the_tokens_of_one(folder: str, expected: list[list[int]]) -> None:
    sharing = ("--oversubscribe", "--workers", "2", "--tp", "2", "--max-rows", "16")
    assert served("-m", folder, *sharing, says=KERNELS, environ={"MGPU_PEER_REDUCE": "1"}) == expected
