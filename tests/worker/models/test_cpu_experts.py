"""Experts on the CPU, wherever their layers are, give the numbers of experts beside their layers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.models.families import EXPERTS
from harness.models.random_model import write_random_model
from harness.models.stored_models import GGUF_EXPERTS, STORED, write_gguf_experts
from harness.models.tiny_models import TinyModel
from harness.ranks.rank_threads import run_ranks
from harness.ranks.stage_driver import CPU, Stages, logits_in_chunks
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.kernels.cpu.tiles import has_kernels
from mgpu.worker.layers.experts.cpu_experts import CpuExperts, HostRows
from mgpu.worker.layers.experts.router import Routing

MakeModel = Callable[[str], TinyModel]
IDS = [5, 90, 17, 3, 44, 61, 8, 29, 70, 11]
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PACKED = [name for name in STORED if "expert" in name or "oss" in name or "moe" in name]
"""Stored formats of models with experts."""


@pytest.mark.parametrize(("tp_size", "num_stages", "split"), [(1, 1, "tensor"), (2, 1, "parallel"), (2, 2, "tensor")])
@pytest.mark.parametrize("family", EXPERTS)
def test_prefill_and_decode_equal_transformers(
    tiny_model: MakeModel, family: str, tp_size: int, num_stages: int, split: str
) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [len(model.prompt_ids)] + [1] * len(model.output_ids)
    how = {"expert_split": split, "cpu_experts": sparse_layers(model)}
    logits = logits_in_chunks(read_checkpoint(model.folder), ids, chunks, tp_size, num_stages, **how)
    torch.testing.assert_close(logits, model.logits, atol=1e-4, rtol=0)
    assert logits[len(model.prompt_ids) - 1 : -1].argmax(-1).tolist() == model.output_ids


def sparse_layers(model: TinyModel) -> tuple[int, ...]:
    """Return all layers with experts but the last: that one stays with its layer."""
    facts = read_checkpoint(model.folder).facts
    layers = [layer for layer in range(facts.num_layers) if facts.experts_of(layer) is not None]
    return tuple(layers[:-1]) or tuple(layers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_random_model(
        tmp_path_factory.mktemp("model"), architectures=["Qwen3MoeForCausalLM"], head_dim=32, num_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=128,
    ))  # fmt: skip


@pytest.mark.parametrize("quant", ["none", "4", "8", "fp8"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_quantized_experts_are_those_of_the_layer(checkpoint: Checkpoint, quant: Quant, ranks: int) -> None:
    beside, apart = (
        logits_in_chunks(checkpoint, IDS, [6, 3, 1], ranks, quant=quant, cpu_experts=layers) for layers in ((), (0, 2))
    )
    assert torch.equal(beside, apart)


@pytest.mark.parametrize("family", GGUF_EXPERTS)
def test_experts_of_gguf_files_stay_packed(tmp_path: Path, family: str) -> None:
    packed = write_gguf_experts(tmp_path, family).packed
    beside, apart = (logits_in_chunks(packed, IDS, [6, 4], cpu_experts=layers) for layers in ((), (0, 1, 2)))
    assert torch.equal(beside, apart)


@pytest.mark.parametrize("name", PACKED)
def test_experts_of_quantized_checkpoints_stay_packed(tmp_path: Path, name: str) -> None:
    packed = STORED[name](tmp_path).packed
    layers = tuple(at for at in range(packed.facts.num_layers) if packed.facts.experts_of(at) is not None)
    beside, apart = (logits_in_chunks(packed, IDS, [6, 4], cpu_experts=each) for each in ((), layers))
    assert torch.equal(beside, apart)


@pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")
@pytest.mark.parametrize("quant", ["4", "8"])
def test_packed_experts_in_bfloat16_are_multiplied_by_kernels(
    checkpoint: Checkpoint, quant: Quant, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_TD = torch.randn(9, checkpoint.facts.hidden_size, generator=torch.Generator().manual_seed(1))
    routing = Routing(torch.tensor([[at % 6, (at + 2) % 6] for at in range(9)]), torch.full((9, 2), 0.5))

    def computed(group: object) -> torch.Tensor:
        [stage] = Stages(checkpoint, group, [range(3)], torch.bfloat16, quant=quant, cpu_experts=(0,)).stages
        experts = stage.layers[0].mlp.experts
        assert (experts.experts.down.packed is None) == repacks  # nothing is left of the first form
        return experts(x_TD.to(torch.bfloat16), routing).float()

    repacks = True
    found = run_ranks(1, computed)[0]
    repacks = False
    monkeypatch.setattr("mgpu.worker.layers.experts.experts.repack", lambda weight, dtype: weight)
    expected = run_ranks(1, computed)[0]
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()


def test_a_layer_on_the_cpu_has_no_second_copy_of_its_experts(checkpoint: Checkpoint) -> None:
    def work(group: object) -> list[int]:
        [stage] = Stages(checkpoint, group, [range(3)], cpu_experts=(1,)).stages
        kinds = [part for _, part in stage.named_modules() if isinstance(part, CpuExperts)]
        assert [stage.layers[1].mlp.experts] == kinds
        assert kinds[0].waits_for_host
        return [stage.weight_bytes()]

    apart = run_ranks(1, work)[0]
    beside = run_ranks(1, lambda group: [Stages(checkpoint, group, [range(3)]).stages[0].weight_bytes()])[0]
    assert apart == beside


def test_rows_go_through_memory_that_grows_and_is_used_again() -> None:
    rows = HostRows(CPU)
    first = rows.bring(x=torch.arange(6.0).view(2, 3), ids=torch.tensor([[1, 2]]))
    assert [each.tolist() for each in first] == [[[0, 1, 2], [3, 4, 5]], [[1, 2]]]
    [again] = rows.bring(x=torch.ones(1, 3))
    assert again.data_ptr() == first[0].data_ptr()
    [larger] = rows.bring(x=torch.full((5, 3), 2.0))
    assert larger.tolist() == [[2.0] * 3] * 5


@needs_gpu
@pytest.mark.parametrize("family", EXPERTS)
def test_layers_on_a_gpu_with_experts_on_the_cpu_equal_those_on_the_cpu(tiny_model: MakeModel, family: str) -> None:
    model = tiny_model(family)
    ids = model.prompt_ids + model.output_ids
    chunks = [len(model.prompt_ids)] + [1] * len(model.output_ids)
    checkpoint, layers = read_checkpoint(model.folder), sparse_layers(model)
    expected = logits_in_chunks(checkpoint, ids, chunks)
    for dtype, error in ((torch.float32, 1e-3), (torch.bfloat16, 0.25)):
        logits = logits_in_chunks(checkpoint, ids, chunks, device=GPU, dtype=dtype, cpu_experts=layers).float()
        assert (logits - expected).abs().max() < error * max(1.0, float(expected.abs().max()))


@needs_gpu
@pytest.mark.parametrize("quant", ["none", "8"])
def test_a_graph_calls_the_processor(checkpoint: Checkpoint, quant: Quant) -> None:
    size = checkpoint.facts.hidden_size

    def work(group: object) -> None:
        types = {"device": GPU, "quant": quant, "cpu_experts": (0, 1)}
        [stage] = Stages(checkpoint, group, [range(3)], torch.bfloat16, **types).stages
        layers = [layer.mlp.experts for layer in stage.layers[:2]]
        assert not any(experts.waits_for_host for experts in layers)
        x_TD = torch.zeros(9, size, dtype=torch.bfloat16, device=GPU)
        ids_TA, weights_TA = torch.zeros(9, 2, dtype=torch.int64, device=GPU), torch.zeros(9, 2, device=GPU)

        def both() -> torch.Tensor:
            y_TD = layers[0](x_TD, Routing(ids_TA, weights_TA))
            return layers[1](y_TD + x_TD, Routing(ids_TA, weights_TA))

        both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TD = both()
        for turn in range(5):
            x_TD.normal_()
            weights_TA.uniform_()
            ids_TA.copy_(torch.tensor([[(at + turn) % 6, (at + turn + 2) % 6] for at in range(9)]))
            graph.replay()
            found = out_TD.clone()
            x, ids, weights = x_TD.cpu(), ids_TA.cpu(), weights_TA.cpu()
            y = layers[0].experts(x, Routing(ids, weights))
            assert torch.equal(found.cpu(), layers[1].experts(y + x, Routing(ids, weights)))

    run_ranks(1, work)


@needs_gpu
@pytest.mark.parametrize("quant", ["none", "4", "8"])
def test_quantized_experts_beside_a_gpu_are_in_the_memory_of_the_machine(checkpoint: Checkpoint, quant: Quant) -> None:
    def work(group: object) -> list[bool]:
        [stage] = Stages(checkpoint, group, [range(3)], device=GPU, quant=quant, cpu_experts=(0, 1)).stages
        places = [layer.mlp.experts for layer in stage.layers]
        held = [(each.experts if isinstance(each, CpuExperts) else each).gate_up for each in places]
        return [(each.weight if each.packed is None else each.packed.words).is_cuda for each in held]

    assert run_ranks(1, work)[0] == [False, False, True]
    on_cpu = logits_in_chunks(checkpoint, IDS, [6, 3, 1], quant=quant)
    apart = logits_in_chunks(checkpoint, IDS, [6, 3, 1], device=GPU, quant=quant, cpu_experts=(0, 1, 2))
    torch.testing.assert_close(apart, on_cpu, atol=2e-3, rtol=0)
