"""Routing, sorting and grouped products equal plain torch for every shape that a model may have."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels.kernel_checks import relative_error, tolerance
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.expert_facts import Clamp, ExpertChoice, ExpertFacts
from mgpu.protocol.model.quantization import Quant, weight_format
from mgpu.protocol.model.weight_format import WeightFormat
from mgpu.worker.kernels.experts import choose
from mgpu.worker.kernels.experts import route_and_sort as route_and_sort_module
from mgpu.worker.kernels.experts.choose import (
    FEW_TOKENS,
    ExpertStacks,
    RouterWeights,
    Tiles,
    routed_experts,
    sparse_mlp,
)
from mgpu.worker.kernels.experts.choose_in_groups import choose_in_groups
from mgpu.worker.kernels.experts.combine import PairRows
from mgpu.worker.kernels.experts.few import FewTiling, SharedNetwork, few_tokens
from mgpu.worker.kernels.experts.grouped import GroupedTiling, grouped_down, grouped_gate_up
from mgpu.worker.kernels.experts.route import route_few
from mgpu.worker.kernels.experts.route_and_sort import Choice, route_and_sort
from mgpu.worker.kernels.experts.sort import SortedPairs, most_tiles, sort_pairs
from mgpu.worker.kernels.reference import rms_norm
from mgpu.worker.layers.experts.router import ExpertCorrection, Router
from mgpu.worker.layers.partial_sum import summed_tensor
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.quantization.random_packed import random_packed
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


@pytest.mark.parametrize(
    ("tokens", "k", "count", "active", "normalizes", "is_many"),
    [(1, 64, 8, 2, True, False), (4, 48, 6, 3, False, False), (6, 160, 60, 4, True, False),
     (5, 300, 128, 8, False, False), (20, 32, 8, 2, True, True), (35, 48, 6, 3, False, True)],
)  # fmt: skip
def test_routing_chooses_the_best_and_weighs_them(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    k: int,
    count: int,
    active: int,
    normalizes: bool,
    is_many: bool,
) -> None:
    monkeypatch.setattr(route_and_sort_module, "MANY_TOKENS", 0 if is_many else 512)
    x, w, bias = draw(tokens, k, device=device), draw(count, k, device=device), draw(count, device=device)
    for given in (None, bias):
        expected, expected_weights = reference_routing(F.linear(x, w, given), active, normalizes)
        (experts, weights), pairs = route_and_sort(x, w, Choice(active, normalizes, given, 1, count - 2), 16)
        check_tiles(pairs, experts, 1, count - 2)
        found = [(experts, weights)]
        if tokens <= FEW_TOKENS:
            found.append(route_few(x, w, active, normalizes, given))
        for chosen, weighed in found:
            assert torch.equal(chosen.long(), expected)
            torch.testing.assert_close(weighed, expected_weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [512, 0])
def test_routing_takes_smaller_tiles_where_memory_is_small(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(route_and_sort_module, "MANY_TOKENS", most)
    x, w, bias = draw(7, 160, device=device), draw(60, 160, device=device), draw(60, device=device)
    expected, expected_weights = route_and_sort(x, w, Choice(4, True, bias, 0, 60), 16)[0]
    monkeypatch.setattr(route_and_sort_module, "shared_bytes", lambda device: 16 << 10)
    (experts, weights), pairs = route_and_sort(x, w, Choice(4, True, bias, 0, 60), 16)
    check_tiles(pairs, experts, 0, 60)
    assert torch.equal(experts, expected)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("choice", "count", "normalizes", "is_corrected"),
    [
        (ExpertChoice("sigmoid", 4, 2, 2, True, 2.5), 24, True, True),
        (ExpertChoice("softmax", 5, 3, 1), 20, False, False),
        (ExpertChoice("sigmoid", has_correction=True), 13, True, True),
        (ExpertChoice("softmax", scale=16.0), 64, True, False),
    ],
)
def test_experts_of_the_best_groups_are_chosen_as_plain_torch_does(
    device: torch.device, choice: ExpertChoice, count: int, normalizes: bool, is_corrected: bool
) -> None:
    logits, correction = draw(5, 3 * count, device=device)[:, :count], draw(count, device=device) * 0.1
    router = object.__new__(Router)
    router.facts = ExpertFacts(count, 3, 8, (True,), normalizes, choice=choice)
    router.correction = ExpertCorrection(count, device) if is_corrected else None
    if router.correction is not None:
        router.correction.weight.copy_(correction)
    expected = router._choose(logits, choice)
    experts, weights = choose_in_groups(logits, choice, 3, normalizes, correction if is_corrected else None)
    assert torch.equal(experts.long(), expected.experts_TA)
    torch.testing.assert_close(weights, expected.weights_TA, atol=1e-6, rtol=1e-5)


def check_tiles(pairs: SortedPairs, experts_TA: Tensor, first: int, count: int) -> None:
    """Every pair of an expert of this rank is in one tile of that expert, and tiles have no more rows than they may."""
    flat, found = experts_TA.flatten().tolist(), []
    rows = int(pairs.num_tiles[0])
    assert rows <= len(pairs.tiles_M4) == most_tiles(len(flat), count, pairs.block_m)
    row = 0
    for expert, begin, end, behind in pairs.tiles_M4[:rows].tolist():
        last = min(end, begin + pairs.block_m)
        assert row == begin < last
        row = last
        mine = pairs.order_P[begin + behind : last + behind].tolist()
        assert {flat[pair] for pair in mine} == {expert + first}
        found += mine
    assert sorted(found) == [pair for pair, expert in enumerate(flat) if first <= expert < first + count]


@pytest.mark.parametrize("tokens", [2, 5])
def test_equal_scores_choose_the_first_experts(device: torch.device, tokens: int) -> None:
    x, w = torch.zeros(tokens, 32, device=device), torch.ones(8, 32, device=device)
    routing, _ = route_and_sort(x, w, Choice(3, True, None, 0, 8), 16)
    for experts, weights in (routing, route_few(x, w, 3, True)):
        assert experts.tolist() == [[0, 1, 2]] * tokens
        torch.testing.assert_close(weights, torch.full((tokens, 3), 1 / 3, device=device))


@pytest.mark.parametrize("most", [512, 0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_scores_give_no_expert_more_pairs_than_places(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, sign: float, most: int
) -> None:
    """An activation that overflows leaves fewer experts above -inf than a token needs: one may then be chosen twice."""
    monkeypatch.setattr(route_and_sort_module, "MANY_TOKENS", most)
    tokens = 5
    x, w = torch.zeros(tokens, 32, device=device), torch.full((8, 32), -1.0, device=device)
    x[:, 0], w[0, 0] = torch.inf, sign
    _, pairs = route_and_sort(x, w, Choice(2, True, None, 0, 8), 16)
    for expert, begin, end, behind in pairs.tiles_M4[: int(pairs.num_tiles[0])].tolist():
        assert expert * tokens == begin + behind < end + behind <= (expert + 1) * tokens
        assert set(pairs.order_P[begin + behind : end + behind].tolist()) <= set(range(2 * tokens))


@pytest.mark.parametrize("most", [512, 0])
def test_lists_of_experts_that_all_or_no_tokens_choose(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(route_and_sort_module, "MANY_TOKENS", most)
    x, w = torch.ones(20, 16, device=device), torch.zeros(6, 16, device=device)
    for _ in range(2):  # counters are left as they were found
        w[5] += 1.0
        (experts, _), pairs = route_and_sort(x, w, Choice(1, True, None, 0, 6), 16)
        check_tiles(pairs, experts, 0, 6)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_sorting_groups_pairs_by_expert_in_order(
    device: torch.device, tokens: int, first: int, count: int, block_m: int
) -> None:
    experts = torch.rand(tokens, 6, device=device).argsort(-1)[:, :2].to(torch.int32)
    pairs = sort_pairs(experts, first, count, block_m)
    flat = experts.flatten().tolist()
    expected = [pair for expert in range(first, first + count) for pair, each in enumerate(flat) if each == expert]
    assert pairs.order_P[: len(expected)].tolist() == expected
    check_tiles(pairs, experts, first, count)


def test_the_first_expert_may_take_all_or_nothing(device: torch.device) -> None:
    for chosen in (0, 5):
        order, tiles, number, *_ = sort_pairs(torch.full((40, 1), chosen, dtype=torch.int32, device=device), 0, 6, 16)
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
    ("shape", "first", "part", "tokens", "dtype"),
    [
        (SHAPES[0], 0, 1, 1, torch.float32),
        (SHAPES[0], 0, 1, 3, torch.bfloat16),
        (SHAPES[0], 1, 2, 9, torch.float32),
        (SHAPES[0], 0, 1, 9, torch.bfloat16),
        (SHAPES[1], 1, 2, 1, torch.float32),
        (SHAPES[1], 1, 2, 3, torch.bfloat16),
        (SHAPES[1], 0, 1, 9, torch.float32),
        (SHAPES[1], 1, 2, 9, torch.bfloat16),
    ],
)
def test_experts_equal_one_pair_after_the_other(
    device: torch.device, shape: tuple[int, int, int, int], first: int, part: int, tokens: int, dtype: torch.dtype
) -> None:
    x, gate_up, down, routing = case(device, tokens, shape, dtype, first, shape[2] // part)
    got = summed_tensor(routed_experts(x, ExpertStacks(gate_up, down, first, "silu"), routing))
    assert relative_error(got, reference_experts(x, gate_up, down, routing, first)) < 2 * tolerance(dtype)


@pytest.mark.parametrize(("tokens", "block_m"), [(3, 16), (3, 128), (40, 16), (40, 32), (40, 64)])
def test_tiles_of_any_height_give_the_same(device: torch.device, tokens: int, block_m: int) -> None:
    x, gate_up, down, (experts, weights) = case(device, tokens, (32, 24, 6, 2), torch.float32, 0, 6)
    tiles = Tiles(block_m, GroupedTiling(16, 32, 4, 2), GroupedTiling(64, 16, 4, 2))
    pairs = sort_pairs(experts, 0, 6, block_m)
    h = grouped_gate_up(x, gate_up, pairs, weights, 1, tiles.gate_up)
    got = PairRows(grouped_down(h, down, pairs, weights, tiles.down), experts, 0, 6).total()
    assert relative_error(got, reference_experts(x, gate_up, down, (experts, weights), 0)) < tolerance(torch.float32)


@pytest.mark.parametrize("tiling", [FewTiling(), FewTiling(8, 32, 1, 4, 16, 1)])
@pytest.mark.parametrize(("first", "held"), [(0, 7), (3, 2)])
def test_few_tokens_with_any_tiles(device: torch.device, tiling: FewTiling, first: int, held: int) -> None:
    x, gate_up, down, routing = case(device, 2, (24, 12, 7, 3), torch.float32, first, held)
    got = few_tokens(x, gate_up, down, routing, first, 1, tiling)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, first)) < tolerance(torch.float32)


@pytest.mark.parametrize(
    ("tokens", "width", "is_shared_out", "first", "dtype"),
    [(1, 12, True, 0, torch.float32), (2, 30, False, 3, torch.float32), (3, 5, True, 0, torch.bfloat16)],
)
def test_few_tokens_take_what_they_share_along(
    device: torch.device, tokens: int, width: int, is_shared_out: bool, first: int, dtype: torch.dtype
) -> None:
    """The shared network may be wider or narrower than an expert, and a token may take a share of it only."""
    x, gate_up, down, routing = case(device, tokens, (24, 12, 7, 3), dtype, first, 4)
    _, both, shared_down, _ = case(device, tokens, (24, width, 1, 1), dtype, 0, 1)
    share = draw(1, 24, device=device, dtype=dtype) if is_shared_out else None
    shared = SharedNetwork(both[0], shared_down[0], share)
    stacks = ExpertStacks(gate_up, down, first, "silu", shared)
    assert stacks.includes_shared(tokens)
    assert not stacks.includes_shared(FEW_TOKENS + 1)
    got = summed_tensor(routed_experts(x, stacks, routing))
    taken = torch.ones(tokens, 1, device=device) if share is None else (x.float() @ share.float().T).sigmoid()
    of_all = reference_experts(x, both, shared_down, (torch.zeros_like(routing[0][:, :1]), taken), 0)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, first) + of_all) < 2 * tolerance(dtype)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_computes_what_tokens_share_while_it_chooses(device: torch.device, tokens: int) -> None:
    x, gate_up, down, _ = case(device, tokens, (24, 12, 6, 2), torch.float32, 0, 6)
    _, both, shared_down, _ = case(device, tokens, (24, 30, 1, 1), torch.float32, 0, 1)
    w, share = draw(6, 24, device=device), draw(1, 24, device=device)
    stacks = ExpertStacks(gate_up, down, 0, "silu", SharedNetwork(both[0], shared_down[0], share))
    got = summed_tensor(sparse_mlp(x, RouterWeights(w, 2, True), stacks))
    routing = reference_routing(F.linear(x, w), 2, True)
    everyone = torch.zeros_like(routing[0][:, :1]), (x @ share.T).sigmoid()
    of_all = reference_experts(x, both, shared_down, everyone, 0)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, 0) + of_all) < 1e-5


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_whole_layer_chooses_and_computes(device: torch.device, tokens: int) -> None:
    x, gate_up, down, _ = case(device, tokens, (24, 12, 6, 2), torch.float32, 0, 6)
    w = draw(6, 24, device=device)
    got = summed_tensor(sparse_mlp(x, RouterWeights(w, 2, True), ExpertStacks(gate_up, down, 0, "silu")))
    routing = reference_routing(F.linear(x, w), 2, True)
    assert relative_error(got, reference_experts(x, gate_up, down, routing, 0)) < tolerance(torch.float32)


@pytest.mark.parametrize("tokens", [2])
@pytest.mark.parametrize("quant", ["8", "4", "fp8"])
def test_quantized_experts_equal_dequantized_ones(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, quant: Quant, tokens: int
) -> None:
    x, gate_up, down, routing = case(device, tokens, (32, 16, 4, 2), torch.float32, 0, 4)
    stacks = [packed(gate_up, quant), packed(down, quant)]
    dense = [torch.stack([dequantize(matrix_of(stack, at), torch.float32) for at in range(4)]) for stack in stacks]
    expected = reference_experts(x, dense[0], dense[1], routing, 0)
    held = ExpertStacks(stacks[0], stacks[1], 0, "silu")
    for few in (FEW_TOKENS, 0):
        monkeypatch.setattr(choose, "FEW_TOKENS", few)
        assert relative_error(summed_tensor(routed_experts(x, held, routing)), expected) < 3e-5
    router = RouterWeights(draw(4, 32, device=device), 2, True)
    packed_sum = summed_tensor(sparse_mlp(x, router, held))
    monkeypatch.setattr(choose, "PACKED_TOKENS", 0)
    assert relative_error(summed_tensor(sparse_mlp(x, router, held)), packed_sum) < 3e-5


GROUPED = {
    "fp8-blocks": WeightFormat("fp8", 32, 16, 2, source="x"), "int8-groups": WeightFormat("8", 32, 1, 2, source="x"),
    "fp8-whole-blocks": WeightFormat("fp8", 128, 128, 4, source="x"),
    "int4-zeros": WeightFormat("4", 32, 1, 2, 1, source="x"), "mxfp4": WeightFormat("fp4", 32, 1, 1, source="x"),
    **{kind: GGUF_FORMATS[kind] for kind in ("Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K")},
}  # fmt: skip
"""Each way in which scales and codes are held; `test_scaled.py` has all types."""


@pytest.mark.parametrize("name", GROUPED)
def test_experts_whose_groups_have_scales_equal_dequantized_ones(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(choose, "PACKED_TOKENS", 2)
    monkeypatch.setattr(choose, "FEW_TOKENS", 0)
    form, (tokens, count) = GROUPED[name], (3, 2)
    dim = width = max(32, form.block, form.group)
    generator = torch.Generator(device).manual_seed(0)
    stacks = []
    for parts, inputs in (((width, width), dim), ((dim,), width)):
        matrices = [random_packed(form, parts, inputs, generator) for _ in range(count)]
        stacks.append(empty_stack(matrices[0], count))
        for index, matrix in enumerate(matrices):
            put_matrix(stacks[-1], index, matrix)
    dense = [torch.stack([dequantize(matrix_of(stack, at), torch.float32) for at in range(count)]) for stack in stacks]
    x, w = draw(tokens, dim, device=device), draw(count, dim, device=device)
    expected = reference_experts(x, dense[0], dense[1], reference_routing(F.linear(x, w), 1, False), 0)
    got = summed_tensor(sparse_mlp(x, RouterWeights(w, 1, False), ExpertStacks(stacks[0], stacks[1], 0, "silu")))
    assert relative_error(got, expected) < 3e-5


def test_packed_experts_have_biases_and_clamped_gates(device: torch.device) -> None:
    """As gpt-oss has them: some gates and ups are beyond the limit, and the biases are of each expert."""
    form, count, dim, clamp = GROUPED["mxfp4"], 3, 64, Clamp(alpha=1.702, limit=1.0)
    generator = torch.Generator(device).manual_seed(0)
    stacks = []
    for parts in ((dim, dim), (dim,)):
        stacks.append(empty_stack(random_packed(form, parts, dim, generator), count))
        for index in range(count):
            put_matrix(stacks[-1], index, random_packed(form, parts, dim, generator))
    biases = draw(count, 2 * dim, device=device), draw(count, dim, device=device)
    x, experts = draw(5, dim, device=device), torch.tensor([[0], [2], [1], [2], [2]], device=device)
    weights = torch.rand(5, 1, device=device)
    expected = torch.zeros(5, dim, device=device)
    for token, expert in enumerate(experts[:, 0].tolist()):
        first, second = (dequantize(matrix_of(stack, expert), torch.float32) for stack in stacks)
        gate, up = (first @ x[token] + biases[0][expert]).chunk(2)
        gate, up = gate.clamp(max=clamp.limit), up.clamp(-clamp.limit, clamp.limit)
        hidden = (up + 1) * gate * torch.sigmoid(clamp.alpha * gate)
        expected[token] = weights[token] * (second @ hidden + biases[1][expert])
    held = ExpertStacks(stacks[0], stacks[1], 0, "silu", biases=biases, clamp=clamp)
    experts = experts.to(torch.int32)
    for first, end in ((0, 5), (3, 5), (1, 2)):  # many tokens, some, one
        got = summed_tensor(routed_experts(x[first:end], held, (experts[first:end], weights[first:end])))
        assert relative_error(got, expected[first:end]) < 3e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_adds_up_the_rows_of_experts(device: torch.device, dtype: torch.dtype) -> None:
    experts = torch.tensor([[0, 3], [2, 1], [1, 3]], dtype=torch.int32, device=device)
    y, residual = draw(6, 40, device=device, dtype=dtype), draw(3, 40, device=device, dtype=dtype)
    weight = draw(40, device=device, dtype=dtype)
    is_here = ((experts >= 1) & (experts < 3)).unsqueeze(-1)
    rows = PairRows(y.masked_fill(~is_here.view(6, 1), torch.nan), experts, 1, 2)
    total = (y.view(3, 2, 40).float() * is_here).sum(1).to(dtype)
    assert torch.equal(rows.total(), total)
    expected = residual + total
    normalized = rows.add_and_norm(residual, weight, 1e-6)
    assert torch.equal(residual, expected)
    assert relative_error(normalized, rms_norm(expected, weight, 1e-6)) < tolerance(dtype)


def packed(stack: Tensor, quant: Quant) -> PackedWeight:
    matrices = [quantize(matrix, weight_format(quant)) for matrix in stack]
    whole = empty_stack(matrices[0], len(matrices))
    for index, matrix in enumerate(matrices):
        put_matrix(whole, index, matrix)
    return whole
