"""Routing, sorting and grouped products equal plain torch for every shape that a model may have."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernel_checks import relative_error, tolerance
from mgpu.protocol.model.quantization import Quant, weight_format
from mgpu.worker.kernels.experts import choose
from mgpu.worker.kernels.experts.choose import ExpertStacks, RouterWeights, Tiles, routed_experts, sparse_mlp
from mgpu.worker.kernels.experts.few import FewTiling, few_tokens
from mgpu.worker.kernels.experts.grouped import GroupedTiling, combine, grouped_down, grouped_gate_up
from mgpu.worker.kernels.experts.route import route
from mgpu.worker.kernels.experts.sort import most_tiles, sort_pairs
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.stacks import empty_stack, matrix_of, put_matrix


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def reference_routing(scores: Tensor, active: int, normalizes: bool) -> tuple[Tensor, Tensor]:
    weights, experts = torch.topk(scores.float().softmax(-1), active)
    return experts, weights / weights.sum(-1, keepdim=True) if normalizes else weights


def reference_experts(x: Tensor, gate_up: Tensor, down: Tensor, routing: tuple[Tensor, Tensor], first: int) -> Tensor:
    """Compute in float32, one pair of token and expert after the other."""
    out = torch.zeros(x.shape, device=x.device)
    experts, weights = routing
    for token, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            if first <= expert < first + len(down):
                gate, up = F.linear(x[token].float(), gate_up[expert - first].float()).chunk(2)
                y = F.linear(F.silu(gate) * up, down[expert - first].float())
                out[token] += weights[token, place] * y
    return out


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize(
    ("tokens", "k", "count", "active"),
    [(1, 64, 8, 2), (5, 48, 6, 3), (20, 160, 60, 4), (3, 300, 128, 8), (520, 32, 8, 2)],
)
def test_routing_chooses_the_best_and_weighs_them(
    device: torch.device, tokens: int, k: int, count: int, active: int, normalizes: bool
) -> None:
    x, w, bias = draw(tokens, k, device=device), draw(count, k, device=device), draw(count, device=device)
    for given in (None, bias):
        experts, weights = route(x, w, active, normalizes, given)
        expected, expected_weights = reference_routing(F.linear(x, w, given), active, normalizes)
        assert torch.equal(experts.long(), expected)
        torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


def test_equal_scores_choose_the_first_experts(device: torch.device) -> None:
    experts, weights = route(torch.zeros(2, 32, device=device), torch.ones(8, 32, device=device), 3, True)
    assert experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3, device=device))


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_sorting_groups_pairs_by_expert_in_order(
    device: torch.device, tokens: int, first: int, count: int, block_m: int
) -> None:
    experts = torch.rand(tokens, 6, device=device).argsort(-1)[:, :2].to(torch.int32)
    order, tiles, number, _ = sort_pairs(experts, first, count, block_m)
    flat = experts.flatten().tolist()
    expected = [pair for expert in range(first, first + count) for pair, each in enumerate(flat) if each == expert]
    assert order[: len(expected)].tolist() == expected
    rows, covered = int(number[0]), 0
    assert rows <= len(tiles) == most_tiles(2 * tokens, count, block_m)
    for expert, begin, end, _ in tiles[:rows].tolist():
        assert begin == covered
        covered = min(begin + block_m, end)
        assert {flat[pair] for pair in expected[begin:covered]} == {expert + first}
    assert covered == len(expected)


def test_the_first_expert_may_take_all_or_nothing(device: torch.device) -> None:
    for chosen in (0, 5):
        order, tiles, number, _ = sort_pairs(torch.full((40, 1), chosen, dtype=torch.int32, device=device), 0, 6, 16)
        assert order.tolist() == [*range(40)]
        assert tiles[: int(number[0])].tolist()[-1][:3] == [chosen, 32, 40]


SHAPES = [(20, 8, 6, 2), (16, 12, 8, 8)]
"""Model dim, width, experts, active experts."""


def case(
    device: torch.device, tokens: int, shape: tuple[int, int, int, int], dtype: torch.dtype, first: int, held: int
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    dim, width, count, active = shape
    x = draw(tokens, dim, device=device, dtype=dtype)
    gate_up = draw(held, 2 * width, dim, device=device, dtype=dtype) * dim**-0.5
    down = draw(held, dim, width, device=device, dtype=dtype) * width**-0.5
    experts, weights = reference_routing(draw(tokens, count, device=device), active, True)
    return x, gate_up, down, (experts.to(torch.int32), weights)


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (9, torch.float32), (9, torch.bfloat16)]
)
@pytest.mark.parametrize(("first", "part"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_equal_one_pair_after_the_other(
    device: torch.device, shape: tuple[int, int, int, int], first: int, part: int, tokens: int, dtype: torch.dtype
) -> None:
    x, gate_up, down, routing = case(device, tokens, shape, dtype, first, shape[2] // part)
    got = routed_experts(x, ExpertStacks(gate_up, down, first, "silu"), routing)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, first)) < 2 * tolerance(dtype)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [3, 40])
def test_tiles_of_any_height_give_the_same(device: torch.device, tokens: int, block_m: int) -> None:
    x, gate_up, down, (experts, weights) = case(device, tokens, (32, 24, 6, 2), torch.float32, 0, 6)
    tiles = Tiles(block_m, GroupedTiling(16, 32, 4, 2), GroupedTiling(64, 16, 4, 2))
    pairs = sort_pairs(experts, 0, 6, block_m)
    h = grouped_gate_up(x, gate_up, pairs, weights, 1, tiles.gate_up)
    got = combine(grouped_down(h, down, pairs, weights, tiles.down), experts, 0, 6)
    assert relative_error(got, reference_experts(x, gate_up, down, (experts, weights), 0)) < tolerance(torch.float32)


@pytest.mark.parametrize("tiling", [FewTiling(), FewTiling(8, 32, 1, 4, 16, 1)])
@pytest.mark.parametrize(("first", "held"), [(0, 7), (3, 2)])
def test_few_tokens_with_any_tiles(device: torch.device, tiling: FewTiling, first: int, held: int) -> None:
    x, gate_up, down, routing = case(device, 2, (24, 12, 7, 3), torch.float32, first, held)
    got = few_tokens(x, gate_up, down, routing, first, 1, tiling)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, first)) < tolerance(torch.float32)


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_whole_layer_chooses_and_computes(device: torch.device, tokens: int) -> None:
    x, gate_up, down, _ = case(device, tokens, (24, 12, 6, 2), torch.float32, 0, 6)
    w = draw(6, 24, device=device)
    got = sparse_mlp(x, RouterWeights(w, 2, True), ExpertStacks(gate_up, down, 0, "silu"))
    routing = reference_routing(F.linear(x, w), 2, True)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, 0)) < tolerance(torch.float32)


@pytest.mark.parametrize("tokens", [3])
@pytest.mark.parametrize("quant", ["8", "4", "fp8"])
def test_quantized_experts_equal_dequantized_ones(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, quant: Quant, tokens: int
) -> None:
    x, gate_up, down, routing = case(device, tokens, (32, 16, 4, 2), torch.float32, 0, 4)
    stacks = [packed(gate_up, quant), packed(down, quant)]
    dense = [torch.stack([dequantize(matrix_of(stack, at), torch.float32) for at in range(4)]) for stack in stacks]
    expected = reference_experts(x, dense[0], dense[1], routing, 0)
    held = ExpertStacks(stacks[0], stacks[1], 0, "silu")
    assert relative_error(routed_experts(x, held, routing), expected) < 3e-5
    router = RouterWeights(draw(4, 32, device=device), 2, True)
    few = sparse_mlp(x, router, held)
    monkeypatch.setattr(choose, "PACKED_TOKENS", 0)
    assert relative_error(sparse_mlp(x, router, held), few) < 3e-5


def packed(stack: Tensor, quant: Quant) -> PackedWeight:
    matrices = [quantize(matrix, weight_format(quant)) for matrix in stack]
    whole = empty_stack(matrices[0], len(matrices))
    for index, matrix in enumerate(matrices):
        put_matrix(whole, index, matrix)
    return whole
