"""Plans of models with latent attention: DeepSeek V3 on 8 GPUs by hand arithmetic, copies of the cache, refusals."""

from dataclasses import replace

import pytest

from harness.machines import gpus
from harness.specs import make_facts
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.orchestrator.placement.reports.speed import estimate_speed
from mgpu.orchestrator.placement.reports.table import layout_json, layout_text
from mgpu.protocol.model.attention_facts import LatentFacts
from mgpu.protocol.model.expert_facts import ExpertChoice, ExpertFacts

DEEPSEEK_V3 = make_facts(
    q=128, kv=1, layers=61, hidden=7168, width=18432, head_dim=576, vocab=129280, context=163840,
    architecture="deepseek_v3", latent=LatentFacts(512, 64, 128, 128, 1536), attention_scale=192**-0.5,
    experts=ExpertFacts(
        256, 8, 2048, (False,) * 3 + (True,) * 58, normalizes=True, shared_width=2048,
        choice=ExpertChoice("sigmoid", 8, 4, 2, True, 2.5),
    ),
)  # fmt: skip
KV_TOKEN = 61 * 576 * 2


def fp8(outputs: int, inputs: int) -> int:
    """Return the bytes of a matrix with a scale per output."""
    return outputs * inputs + 4 * outputs


def test_deepseek_v3_on_8_gpus_is_counted_by_hand() -> None:
    planned = plan(DEEPSEEK_V3, gpus(*[141] * 8), LayoutOptions(quant="fp8"))
    whole = fp8(1536 + 576, 7168) + 2 * (2 * 7168 + 1536 + 512)  # what all ranks hold: first projections, norms
    of_16_heads = fp8(16 * 192, 1536) + fp8(7168, 16 * 128) + 2 * 16 * (128 + 128) * 512
    dense = 2 * fp8(18432 // 8, 7168) + fp8(7168, 18432 // 8)
    expert = 2 * fp8(2048 // 8, 7168) + fp8(7168, 2048 // 8)
    sparse = 257 * expert + 2 * (256 * 7168 + 256)  # with the shared one, and the router
    edges = 2 * (2 * 129280 // 8 * 7168 + 7168)
    expected = 61 * (whole + of_16_heads) + 3 * dense + 58 * sparse + edges
    assert [row.weight_bytes for row in planned.rows] == [expected] * 8
    assert [row.kv_token_bytes for row in planned.rows] == [KV_TOKEN] * 8 == [70272] * 8
    assert [(row.heads.num_q, row.heads.num_kv, row.heads.kv_replicas) for row in planned.rows] == [(16, 1, 8)] * 8
    left = planned.rows[0].budget_bytes - expected - planned.rows[0].reserve_bytes
    assert left - 64 * KV_TOKEN < planned.rows[0].kv_bytes <= left


def test_what_is_cached_and_how_much_of_it_is_copies_is_shown() -> None:
    planned = plan(DEEPSEEK_V3, gpus(*[141] * 8), LayoutOptions(quant="fp8", kv_memory=KV_TOKEN << 16))
    words = (
        "latent cache: 576 values per token in each of 61 layers, for all heads: 68.6 KiB per token on rank 0; all "
        "ranks of a stage hold the same, so 30.0 GiB of 34.3 GiB are copies"
    )
    assert words in layout_text(planned)
    assert "1 [0, 1) on 8 ranks" in layout_text(planned)
    assert layout_json(planned)["ranks"][0]["kv_token_bytes"] == KV_TOKEN


def test_stages_cache_the_latents_of_their_layers_once() -> None:
    planned = plan(replace(DEEPSEEK_V3, experts=None), gpus(80, 80), LayoutOptions(device_layers="0:20;1:41"))
    assert [row.kv_token_bytes for row in planned.rows] == [20 * 576 * 2, 41 * 576 * 2]
    text = layout_text(planned)
    assert f"{41 * 576 * 2 / 1024:.1f} KiB per token on rank 1" in text
    assert "copies" not in text


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    with pytest.raises(PlacementError, match=r"128 query heads % 3 = 2.*Compatible sizes: 1, 2, 4, 8, 16, 32, 64, 128"):
        plan(DEEPSEEK_V3, gpus(141, 141, 141), LayoutOptions(tp=3))


def test_unequal_shares_are_refused() -> None:
    with pytest.raises(PlacementError, match="the 128 heads of latent attention are split evenly only; use --tp 2"):
        plan(DEEPSEEK_V3, gpus(141, 141), LayoutOptions(tp_shares="3,1"))


def test_the_estimate_of_speed_says_that_it_was_not_tried() -> None:
    small = replace(DEEPSEEK_V3, experts=None)
    speed = estimate_speed(plan(small, described_machine("1xH200", {}), LayoutOptions()))
    assert speed is not None
    assert "latent attention was not measured" in speed.source
