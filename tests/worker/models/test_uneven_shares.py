"""Ranks with unequal shares of the heads compute what one rank computes."""

from pathlib import Path

import pytest
import torch

from harness.models.random_model import write_random_model
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.placement import TensorPart
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.sampling.sampler import Sampled, Sampler
from mgpu.worker.state.rows import RowTable

IDS = [(7 * at + 3) % 251 for at in range(24)]
SHARES = [(5, 3), (3, 3, 2), (1, 4, 2, 1), (1, 1, 1, 1, 1, 1, 1, 1)]
SIZES = {
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16, "intermediate_size": 512, "vocab_size": 251,
    "num_hidden_layers": 2,
}  # fmt: skip
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 9, "num_experts_per_tok": 3,
    "moe_intermediate_size": 96, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
OLMO = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def model(folder: Path, **changes: object) -> Checkpoint:
    return read_checkpoint(write_random_model(folder, **SIZES | changes))


@pytest.fixture(scope="module")
def ten_layers(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model(tmp_path_factory.mktemp("ten"), num_hidden_layers=10, tie_word_embeddings=True)


def assert_equal(checkpoint: Checkpoint, shares: tuple[int, ...], split: ExpertSplit = "tensor") -> None:
    alone = logits_in_chunks(checkpoint, IDS, [17, 1, 6])
    shared = logits_in_chunks(checkpoint, IDS, [17, 1, 6], len(shares), shares=shares, expert_split=split)
    torch.testing.assert_close(shared, alone, atol=2e-5, rtol=0)
    assert torch.equal(shared.argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_shares_of_a_dense_model_add_up(tmp_path: Path, shares: tuple[int, ...]) -> None:
    assert_equal(model(tmp_path), shares)


@pytest.mark.parametrize("changes", [OLMO, EXPERTS], ids=["norm of all heads", "experts"])
def test_shares_of_other_families_add_up(tmp_path: Path, changes: dict[str, object]) -> None:
    assert_equal(model(tmp_path, **changes), (3, 3, 2))


def test_whole_experts_are_shared_by_shares_too(tmp_path: Path) -> None:
    assert_equal(model(tmp_path, **EXPERTS), (5, 3), "parallel")


@pytest.mark.parametrize("quant", ["4", "8"])
def test_quantized_shares_are_slices_of_the_quantized_model(tmp_path: Path, quant: Quant) -> None:
    checkpoint = model(tmp_path)
    alone = logits_in_chunks(checkpoint, IDS, [len(IDS)], quant=quant)
    shared = logits_in_chunks(checkpoint, IDS, [len(IDS)], 3, quant=quant, shares=(3, 3, 2))
    limit = 1e-4 if quant == "4" else 0.3  # int8 scales of a down projection are those of its slice
    torch.testing.assert_close(shared, alone, atol=limit, rtol=0)


LAYER_MAPS = {
    "3 stages": [range(4), range(4, 5), range(5, 10)],
    "4 stages, embedding and head alone": [range(0), range(7), range(7, 10), range(10, 10)],
    "8 stages": [range(at, at + 1) for at in range(6)] + [range(6, 8), range(8, 10)],
    "8 stages, head alone": [range(at, at + 1) for at in range(6)] + [range(6, 10), range(10, 10)],
}


@pytest.mark.parametrize("splits", LAYER_MAPS.values(), ids=LAYER_MAPS)
def test_stages_of_any_length_compute_what_one_computes(ten_layers: Checkpoint, splits: list[range]) -> None:
    alone = logits_in_chunks(ten_layers, IDS, [17, 1, 6])
    assert torch.equal(logits_in_chunks(ten_layers, IDS, [17, 1, 6], splits=splits), alone)
    shared = logits_in_chunks(ten_layers, IDS, [17, 1, 6], 2, splits=splits, shares=(5, 3))
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=0)


def test_slices_of_the_vocabulary_choose_what_the_whole_chooses() -> None:
    """Greedy, drawn, filtered and with log-probabilities."""
    logits = torch.randn((4, 251), generator=torch.Generator().manual_seed(3))
    samplings = [
        RowSampling(), RowSampling(temperature=0.9, seed=5), RowSampling(temperature=1.2, top_p=0.8, seed=9),
        RowSampling(num_logprobs=3),
    ]  # fmt: skip

    def choose(group: ThreadGroup, shares: tuple[int, ...]) -> Sampled:
        part = TensorPart(group.rank, group.size, shares)
        slices = part.vocabulary(251)
        rows = RowTable(8, 64, 16, 8, torch.device("cpu"))
        new = [NewRow(row, bytes(8), 2, [row], sampling) for row, sampling in enumerate(samplings)]
        plan = StepPlan(0, 1, [], new, [], [], [0, 1, 2, 3], [0] * 4, [2] * 4, [1] * 4)
        rows.apply(plan)
        _, request = rows.batch(plan)
        assert request is not None
        mine = slices[group.rank]
        sampler = Sampler(rows, group, tuple(map(len, slices)))
        return sampler.sample(logits[:, mine.start : mine.stop].clone(), request)

    alone = run_ranks(1, lambda group: choose(group, ()))[0]
    for shares in SHARES[:3]:
        for each in run_ranks(len(shares), lambda group, shares=shares: choose(group, shares)):
            assert each.ids_S.tolist() == alone.ids_S.tolist()
            assert each.logprob_list() == alone.logprob_list()
