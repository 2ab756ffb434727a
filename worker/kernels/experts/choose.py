"""Choose how experts are computed for a number of tokens: kernel by kernel, with the fastest measured tiles."""

# T tokens, D model dim, E experts, N experts of this rank, F width on this rank, A active experts of a token

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp
from mgpu.protocol.model.facts import Activation
from mgpu.worker.kernels.experts.combine import PairRows
from mgpu.worker.kernels.experts.few import SharedHalf, SharedNetwork, few_tokens
from mgpu.worker.kernels.experts.few_packed import few_packed
from mgpu.worker.kernels.experts.grouped import GroupedTiling, grouped_down, grouped_gate_up
from mgpu.worker.kernels.experts.grouped_packed import PackedTiling, grouped_packed
from mgpu.worker.kernels.experts.grouped_scaled import flat_stack, grouped_scaled
from mgpu.worker.kernels.experts.route import route_few
from mgpu.worker.kernels.experts.route_and_sort import Choice, route_and_sort
from mgpu.worker.kernels.experts.sort import SortedPairs, sort_pairs
from mgpu.worker.kernels.products.dequantize import dequantize_packed
from mgpu.worker.kernels.products.gemv import GATES
from mgpu.worker.quantization.packing import PackedWeight

FEW_TOKENS = 4
"""Tokens up to which each pair of token and expert reads its weights by itself."""
PACKED_TOKENS = 1024
"""Tokens beyond which quantized experts are dequantized once per step and layer."""

Stack = Tensor | PackedWeight


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """A router, and how it chooses."""

    weight_ED: Tensor
    active: int
    normalizes: bool
    bias_E: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExpertStacks:
    """The experts of one rank, from ``first`` on: ``gate_up`` [N, 2 F, D] and ``down`` [N, D, F], dense or packed."""

    gate_up: Stack
    down: Stack
    first: int
    activation: Activation
    shared: SharedNetwork | None = None
    """What may be computed with the experts of a few tokens."""
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of both stacks; only packed weights whose groups have scales may have any."""
    clamp: Clamp | None = None
    """Set for the gate of gpt-oss; as biases."""

    def includes_shared(self, tokens: int) -> bool:
        """Return True if the output of the shared network is part of what is computed for so many tokens."""
        return self.shared is not None and tokens <= FEW_TOKENS and isinstance(self.gate_up, Tensor)

    @property
    def count(self) -> int:
        return len(self.down.words if isinstance(self.down, PackedWeight) else self.down)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of a tile, and how both products are cut."""

    block_m: int
    gate_up: GroupedTiling
    down: GroupedTiling


def choose_tiles(pairs_per_expert: float, dtype: torch.dtype) -> Tiles:
    """Choose by the average rows of an expert."""
    if dtype == torch.float32:
        small = GroupedTiling(32, 32, 4, 2)
        return Tiles(16, small, small)
    if pairs_per_expert <= 8:
        return Tiles(16, GroupedTiling(64, 128, 4, 3), GroupedTiling(64, 128, 4, 3))
    if pairs_per_expert <= 24:
        return Tiles(32, GroupedTiling(64, 64, 4, 3), GroupedTiling(64, 64, 4, 4))
    if pairs_per_expert <= 96:
        return Tiles(64, GroupedTiling(64, 64, 4, 3), GroupedTiling(128, 64, 4, 3))
    return Tiles(128, GroupedTiling(128, 64, 8, 3, bulk=False), GroupedTiling(256, 64, 8, 4))


def sparse_mlp(x_TD: Tensor, router: RouterWeights, stacks: ExpertStacks) -> Tensor | PairRows:
    """Return this rank's part of the weighted sum over each token's experts, [T, D], or the rows to be added up."""
    if len(x_TD) <= FEW_TOKENS:
        half = None
        if stacks.shared is not None and stacks.includes_shared(len(x_TD)):
            out_TS = torch.empty(len(x_TD), stacks.shared.down.shape[1], dtype=x_TD.dtype, device=x_TD.device)
            half = SharedHalf(stacks.shared, GATES[stacks.activation], out_TS)
        routing = route_few(x_TD, router.weight_ED, router.active, router.normalizes, router.bias_E, half)
        return routed_experts(x_TD, stacks, routing, None if half is None else half.out_TS)
    if len(x_TD) > PACKED_TOKENS:
        stacks = replace(stacks, gate_up=_dense(stacks.gate_up, x_TD.dtype), down=_dense(stacks.down, x_TD.dtype))
    choice = Choice(router.active, router.normalizes, router.bias_E, stacks.first, stacks.count)
    tiles = _tiles(len(x_TD) * router.active, stacks, x_TD.dtype)
    routing, pairs = route_and_sort(x_TD, router.weight_ED, choice, tiles.block_m)
    return _grouped(x_TD, stacks, routing, pairs, tiles)


def routed_experts(
    x_TD: Tensor, stacks: ExpertStacks, routing: tuple[Tensor, Tensor], shared_TS: Tensor | None = None
) -> Tensor | PairRows:
    """Return the weighted sum over experts that are chosen already, or the rows to be added up.

    ``shared_TS``: the first half of the shared network's output, if there is one and it is computed already.
    """
    if len(x_TD) <= FEW_TOKENS and isinstance(stacks.gate_up, Tensor):
        assert isinstance(stacks.down, Tensor), "no stack is packed"
        matrices, gate = (stacks.gate_up, stacks.down), GATES[stacks.activation]
        return few_tokens(x_TD, *matrices, routing, stacks.first, gate, shared=stacks.shared, shared_TS=shared_TS)
    if len(x_TD) <= FEW_TOKENS and _takes_few(stacks.gate_up):
        return _few_packed_tokens(x_TD, stacks, routing)
    tiles = _tiles(routing[0].numel(), stacks, x_TD.dtype)
    pairs = sort_pairs(routing[0], stacks.first, stacks.count, tiles.block_m)
    return _grouped(x_TD, stacks, routing, pairs, tiles)


def _takes_few(stack: Stack) -> bool:
    """Return True for packed weights but int8 in groups, of which `few_packed` was not measured."""
    return isinstance(stack, PackedWeight) and (stack.is_simple or stack.kind != "int8")


def _few_packed_tokens(x_TD: Tensor, stacks: ExpertStacks, routing: tuple[Tensor, Tensor]) -> PairRows:
    gate_up, down, first = stacks.gate_up, stacks.down, stacks.first
    assert isinstance(gate_up, PackedWeight), "dense stacks have `few_tokens`"
    assert isinstance(down, PackedWeight), "both stacks are packed"
    gate, (bias, down_bias) = GATES[stacks.activation], stacks.biases
    h_PF = few_packed(x_TD, gate_up, routing, first, gate, bias_NO=bias, clamp=stacks.clamp)
    y_PD = few_packed(h_PF, down, routing, first, 0, bias_NO=down_bias)
    return PairRows(y_PD, routing[0], first, stacks.count)


def _tiles(pairs: int, stacks: ExpertStacks, dtype: torch.dtype) -> Tiles:
    tiles = choose_tiles(pairs / stacks.count, dtype)
    return replace(tiles, block_m=min(32, tiles.block_m)) if isinstance(stacks.gate_up, PackedWeight) else tiles


def _grouped(
    x_TD: Tensor, stacks: ExpertStacks, routing: tuple[Tensor, Tensor], pairs: SortedPairs, tiles: Tiles
) -> PairRows:
    experts_TA, weights_TA = routing
    gate_up, down, gate = stacks.gate_up, stacks.down, GATES[stacks.activation]
    if isinstance(gate_up, PackedWeight):
        assert isinstance(down, PackedWeight), "both stacks are packed"
        h_PF = _packed_product(x_TD, gate_up, pairs, weights_TA, gate, stacks.biases[0], stacks.clamp)
        y_PD = _packed_product(h_PF, down, pairs, weights_TA, 0, stacks.biases[1])
    else:
        assert isinstance(down, Tensor), "no stack is packed"
        h_PF = grouped_gate_up(x_TD, gate_up, pairs, weights_TA, gate, tiles.gate_up)
        y_PD = grouped_down(h_PF, down, pairs, weights_TA, tiles.down)
    return PairRows(y_PD, experts_TA, stacks.first, stacks.count)


def _packed_product(
    x: Tensor,
    stack: PackedWeight,
    pairs: SortedPairs,
    weights_TA: Tensor,
    gate: int,
    bias: Tensor | None = None,
    clamp: Clamp | None = None,
) -> Tensor:
    if stack.is_simple:
        assert bias is None, "kernels of --quant have no biases"
        return grouped_packed(x, stack, pairs, weights_TA, gate, PackedTiling())
    return grouped_scaled(x, stack, pairs, weights_TA, gate, bias_NO=bias, clamp=clamp)


def _dense(stack: Stack, dtype: torch.dtype) -> Stack:
    """Return a stack as it is, or dequantized into temporary memory.

    Stacks with groups stay packed: the plan reserves no memory for all experts of a layer.
    """
    if isinstance(stack, Tensor) or not stack.is_simple:
        return stack
    count, outputs, _ = stack.words.shape
    return dequantize_packed(flat_stack(stack), dtype).view(count, outputs, stack.k)
