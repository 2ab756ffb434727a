"""Formats of linear weights, in bytes and groups."""

from dataclasses import replace

import pytest

from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.tensor_layout.gpt_oss import MXFP4
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import block_range
from mgpu.protocol.model.quantization import WeightFormat, group_problems, rank_matrices


@pytest.fixture
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    from harness.models.model_files import write_config

    folder = tmp_path_factory.mktemp("model")
    write_config(
        folder,
        {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "intermediate_size": 1536, "vocab_size": 100,
            "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 256, "torch_dtype": "float32",
        },
    )  # fmt: skip
    return read_config_facts(folder)


@pytest.mark.parametrize(("form", "expected"), [
    (WeightFormat(), 2 * 96 * 256), (WeightFormat("8"), 96 * (256 + 4)), (WeightFormat("fp8"), 96 * (256 + 4)),
    (WeightFormat("4", 64), 96 * (128 + 4 * 4)), (WeightFormat("4", 32), 96 * (128 + 8 * 4)),
])  # fmt: skip
def test_a_matrix_takes_its_words_and_its_scales(form: WeightFormat, expected: int) -> None:
    assert form.matrix_bytes(96, 256, 2) == expected


def test_inputs_are_padded_to_whole_blocks_of_words() -> None:
    assert WeightFormat("8").matrix_bytes(1, 129, 2) == 2 * 128 + 4
    assert WeightFormat("4", 64).matrix_bytes(1, 257, 2) == 2 * 128 + 5 * 4


@pytest.mark.parametrize("tp_size", [1, 2, 8, 16])
def test_whole_groups_have_no_problems(facts: ModelFacts, tp_size: int) -> None:
    assert group_problems("4", facts, tp_size) == []


def test_slices_that_cut_a_group_are_named_with_the_numbers(facts: ModelFacts) -> None:
    narrow = replace(facts, intermediate_size=94)
    assert group_problems("4", narrow, 2) == ["MLP width 94 / 2 ranks = 47, not a multiple of 32 (int4 groups)"]
    assert group_problems("4", narrow, 1) == []  # one rank has the rest of the last group as well
    assert group_problems("8", narrow, 2) == group_problems("none", narrow, 2) == []


def test_matrices_of_a_rank_follow_heads_and_width(facts: ModelFacts) -> None:
    assert rank_matrices(facts, 1) == ((512 + 2 * 256, 512), (512, 512), (2 * 1536, 512), (512, 1536))
    # Eight ranks hold one query head and one of the four KV heads each.
    assert rank_matrices(facts, 8) == ((64 + 2 * 64, 512), (512, 64), (2 * 192, 512), (512, 192))


def test_ranks_share_an_mlp_of_a_gguf_file_in_whole_blocks() -> None:
    shares = [block_range(1536, rank, 9, 32) for rank in range(9)]
    assert [share.stop for share in shares[:-1]] == [share.start for share in shares[1:]]
    assert (shares[0].start, shares[-1].stop) == (0, 1536)
    assert {len(share) // 32 for share in shares} == {5, 6}
    assert all(share.start % 32 == 0 for share in shares)
    assert [*map(len, (block_range(10, rank, 3, 0) for rank in range(3)))] == [3, 3, 4]


def test_mxfp4_takes_17_bytes_for_32_weights() -> None:
    assert MXFP4.matrix_bytes(outputs=2, inputs=256, dtype_bytes=2) == 2 * 256 // 32 * 17
