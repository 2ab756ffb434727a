"""Plans of models whose layers have heads of two kinds: bytes by hand arithmetic, sizes that split both, refusals."""

import pytest

from harness.assertions import assert_has_all
from harness.machines import gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed
from mgpu.protocol.model.attention_facts import FullHeads
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import PerLayerInputs

GEMMA4_31B = make_facts(
    q=32, kv=16, layers=60, hidden=5376, width=21504, head_dim=256, vocab=262144, context=262144, tied=True,
    qk_norm=True, architecture="gemma4", sliding_window=1024, value_norm=True, layer_scale=True,
    sliding_layers=tuple(layer % 6 != 5 for layer in range(60)), full_heads=FullHeads(4, 512, 128, True),
)  # fmt: skip
GEMMA4_26B = make_facts(
    q=16, kv=8, layers=30, hidden=2816, width=2112, head_dim=256, vocab=262144, context=262144, tied=True,
    qk_norm=True, architecture="gemma4", sliding_window=1024, value_norm=True, layer_scale=True,
    sliding_layers=tuple(layer % 6 != 5 for layer in range(30)), full_heads=FullHeads(2, 512, 128, True),
    experts=ExpertFacts(128, 8, 704, (True,) * 30, normalizes=True, shared_width=2112, is_branch=True),
)  # fmt: skip
SLIDES = tuple(layer % 5 != 4 for layer in range(35))
GEMMA4_E2B = make_facts(
    q=8, kv=1, layers=35, hidden=1536, width=6144, head_dim=256, vocab=262144, context=131072, tied=True,
    qk_norm=True, architecture="gemma4", sliding_window=512, value_norm=True, layer_scale=True, sliding_layers=SLIDES,
    full_heads=FullHeads(1, 512, 128, False), per_layer=PerLayerInputs(262144, 256), sharing_width=2,
    cache_sources=(*range(15), *(13 if slides else 14 for slides in SLIDES[15:])),
)  # fmt: skip
SLIDING_KV, FULL_KV = 2 * 16 * 256, 2 * 4 * 512
"""Elements that a token has in the cache of a layer."""


def layer_elements(q: int, k: int, v: int, head_dim: int, size: int) -> int:
    """Return the elements of a layer on a rank: q, k, v and the output; gate, up and down; norms and the number."""
    attention = 5376 * (q + k + v + q) // size
    return attention + 3 * 5376 * 21504 // size + 4 * 5376 + 2 * head_dim + 1


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gemma4_31b_in_bf16(tp: int) -> None:
    planned = plan(GEMMA4_31B, gpus(*[141] * tp), LayoutOptions())
    sliding = layer_elements(32 * 256, 16 * 256, 16 * 256, 256, tp)
    full = layer_elements(32 * 512, 4 * 512, 0, 512, tp)
    weights = 2 * (50 * sliding + 10 * full + 262144 * 5376 // tp + 5376)
    assert [row.weight_bytes for row in planned.rows] == [weights] * tp
    assert [row.kv_token_bytes for row in planned.rows] == [2 * (50 * SLIDING_KV + 10 * FULL_KV) // tp] * tp


@pytest.mark.parametrize("tp", [1, 2])
def test_gemma4_26b_has_a_dense_network_beside_its_experts(tp: int) -> None:
    planned = plan(GEMMA4_26B, gpus(*[141] * tp), LayoutOptions())
    sliding, full = (
        2816 * (q + k + v + q) // tp + 2 * head_dim
        for q, k, v, head_dim in ((16 * 256, 8 * 256, 8 * 256, 256), (16 * 512, 2 * 512, 0, 512))
    )
    mlp = 3 * 2816 * (2112 + 128 * 704) // tp
    router_and_norms = 128 * 2816 + 2816 + 128 + 7 * 2816 + 1
    weights = 2 * (25 * sliding + 5 * full + 30 * (mlp + router_and_norms) + 262144 * 2816 // tp + 2816)
    assert [row.weight_bytes for row in planned.rows] == [weights] * tp


@pytest.mark.parametrize("tp", [1, 2])
def test_gemma4_e2b_shares_caches_and_has_inputs_of_each_layer(tp: int) -> None:
    planned = plan(GEMMA4_E2B, gpus(*[80] * tp), LayoutOptions())
    weights = 35 * 256 * (262144 // tp + 1536) + 256 + 262144 // tp * 1536 + 1536  # tables, projection, norms
    for layer, slides in enumerate(SLIDES):
        dim, own = (256 if slides else 512), layer < 15
        weights += 1536 * (8 + 8) * dim // tp + own * 1536 * 2 * dim + (1 + own) * dim
        weights += 3 * 1536 * 6144 * (1 if own else 2) // tp
        weights += 2 * 1536 * 256 + 5 * 1536 + 1
    assert [row.weight_bytes for row in planned.rows] == [2 * weights] * tp
    assert [row.kv_token_bytes for row in planned.rows] == [2 * 2 * (12 * 256 + 3 * 512)] * tp


def test_layers_that_share_caches_stay_on_one_stage() -> None:
    with pytest.raises(PlacementError) as caught:
        plan(GEMMA4_E2B, gpus(80, 80), LayoutOptions(device_layers="0:20;1:15"))
    words = "2 stages", "each of 35 layers has inputs", "layers 15 to 34 read the keys and values of layers 13 and 14"
    assert_has_all(str(caught.value), *words, "Use one GPU, or --tp")


def test_eight_ranks_hold_each_kv_head_of_full_layers_twice() -> None:
    planned = plan(GEMMA4_31B, gpus(*[80] * 8), LayoutOptions())
    assert planned.rows[0].kv_token_bytes == 2 * (50 * SLIDING_KV // 8 + 10 * FULL_KV // 4)


def test_stages_count_the_layers_of_each_kind() -> None:
    planned = plan(GEMMA4_31B, gpus(80, 80), LayoutOptions(device_layers="0:10;1:50"))
    assert [row.kv_token_bytes for row in planned.rows] == [
        2 * (9 * SLIDING_KV + 1 * FULL_KV), 2 * (41 * SLIDING_KV + 9 * FULL_KV)
    ]  # fmt: skip


def test_a_size_must_split_the_kv_heads_of_both_kinds() -> None:
    odd = make_facts(q=12, kv=6, layers=2, full_heads=FullHeads(4, 256, 64, False), sliding_layers=(True, False))
    with pytest.raises(PlacementError) as caught:
        plan(odd, gpus(80, 80, 80), LayoutOptions())
    assert_has_all(str(caught.value), "4 KV heads % 3 = 1 in full layers", "Compatible sizes: 1, 2, 12")


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(PlacementError, match="full layers have 4 KV heads, others 16, which split evenly only"):
        plan(GEMMA4_31B, gpus(80, 80), LayoutOptions(tp_shares="10,6"))


def test_the_estimate_of_speed_reads_what_windows_show() -> None:
    speed = estimate_speed(plan(GEMMA4_31B, described_machine("1xH200", {}), LayoutOptions()))
    assert speed is not None
    assert 40 < speed.one_stream < 4800 / 61.4
