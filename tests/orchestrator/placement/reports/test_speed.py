"""Estimated speeds: within 15 % of what was measured on H200s, and honest where nothing is known."""

from dataclasses import replace

import pytest

from bench.estimates import Pair, pairs
from harness.machines import GIB, FakeGpu, FakeMemory, FakeNvml, cpus
from harness.specs import make_facts
from mgpu.orchestrator.placement.machine.described import described_machine
from mgpu.orchestrator.placement.machine.devices import find_machine
from mgpu.orchestrator.placement.machine.gpu_facts import GPUS, find_gpu
from mgpu.orchestrator.placement.options import LayoutOptions
from mgpu.orchestrator.placement.planner import Plan, plan
from mgpu.orchestrator.placement.reports.speed import Speed, estimate_speed, number, seconds, speed_lines
from mgpu.protocol.model.expert_facts import ExpertFacts

LLAMA_8B = make_facts(q=32, kv=8, layers=32, hidden=4096, width=14336, vocab=128256, context=131072)


def speed_on(text: str, **options: object) -> Speed:
    found = estimate_speed(plan(LLAMA_8B, described_machine(text, {}), LayoutOptions(**options)))  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize("pair", list(pairs()), ids=lambda pair: pair.what)
def test_h200s_are_met_within_15_percent(pair: Pair) -> None:
    assert abs(pair.error) < 0.15


def test_stages_work_on_different_rows_at_the_same_time() -> None:
    one, two, uneven = (speed_on(text, **options) for text, options in (
        ("1xH200", {}), ("2xH200", {"device_layers": "0:17;1:15"}), ("2xH200", {"device_layers": "0:28;1:4"}),
    ))  # fmt: skip
    assert two.one_stream == pytest.approx(one.one_stream, rel=0.01)
    assert one.many_streams is not None
    assert two.many_streams is not None
    assert uneven.many_streams is not None
    assert one.many_streams < two.many_streams < 2 * one.many_streams
    assert uneven.many_streams < two.many_streams
    assert "within 15 %" in two.source


@pytest.mark.parametrize("options", [{}, {"quant": "fp8"}, {"quant": "8"}, {"quant": "4"}], ids=str)
@pytest.mark.parametrize("kind", [gpu.name for gpu in GPUS if gpu.memory_bytes >= 24 * GIB])
def test_every_known_kind_has_an_estimate_below_its_limit(kind: str, options: dict[str, object]) -> None:
    gpu, found = find_gpu(kind), speed_on(f"1x{kind}", max_seq_len=4096, **options)
    assert gpu is not None
    assert found.many_streams is not None
    assert found.first_token_s is not None
    bits = {"4": 5, None: 16}.get(options.get("quant"), 8)  # type: ignore[call-overload]
    assert 0.2 < found.one_stream / (gpu.bytes_per_s / (7e9 * bits / 8)) < 1
    assert found.one_stream < found.many_streams < 64 * found.one_stream
    assert 2048 * 2 * 7e9 / max(gpu.flops, gpu.float8_flops) < found.first_token_s
    assert "within 15 %" in found.source if kind == "H200" else "not measured" in found.source


def test_before_ampere_kernels_are_launched_one_by_one() -> None:
    old, new = (speed_on(text, quant="4").one_stream for text in ("2xV100 32GB", "2xA100"))
    assert old < 1 / (32 * 314e-6) + 1 < new


def test_faster_memory_more_gpus_and_narrower_weights_are_faster() -> None:
    ordered = [
        speed_on(text).one_stream for text in ("1xL4", "1xA10", "1xRTX 4090", "1xA100", "1xH100", "1xH200", "2xH200")
    ]
    assert ordered == sorted(ordered)
    assert speed_on("1xH200").one_stream < speed_on("1xH200", quant="fp8").one_stream


def test_a_cache_of_long_contexts_counts() -> None:
    planned = plan(LLAMA_8B, described_machine("1xH200", {}), LayoutOptions())
    short, long = (estimate_speed(planned, context=context) for context in (128, 8000))
    assert short is not None
    assert long is not None
    assert long.one_stream == pytest.approx(226, rel=0.15)
    assert long.many_streams == pytest.approx(3297, rel=0.15)
    assert short.one_stream > long.one_stream
    window = replace(LLAMA_8B, sliding_window=1024, sliding_layers=(True,) * 32)
    bounded = estimate_speed(plan(window, described_machine("1xH200", {}), LayoutOptions()), context=8000)
    assert bounded is not None
    assert bounded.many_streams == pytest.approx(9426, rel=0.15)


def test_experts_that_are_not_active_are_not_read() -> None:
    experts = ExpertFacts(count=128, active=8, width=768, sparse_layers=(True,) * 48, normalizes=True)
    moe = make_facts(q=32, kv=4, layers=48, hidden=2048, width=6144, vocab=151936, context=40960, experts=experts)
    found = estimate_speed(plan(moe, described_machine("1xH200", {}), LayoutOptions()), context=176)
    dense = replace(moe, experts=None, intermediate_size=128 * 768)
    whole = estimate_speed(plan(dense, described_machine("1xH200", {}), LayoutOptions()), context=176)
    assert found is not None
    assert whole is not None
    assert whole.one_stream < found.one_stream < 707
    assert found.many_streams is not None
    assert found.many_streams < 4800


@pytest.mark.parametrize(("name", "known"), [
    ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"), ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA L4", "L4"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", "A10"), ("NVIDIA GeForce RTX 3090", "RTX 3090"),
    ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"), ("NVIDIA B200", "B200"),
    ("Tesla V100-SXM2-16GB", "V100"), ("Tesla V100-SXM2-32GB", "V100 32GB"), ("Tesla T4", "T4"), ("NVIDIA A40", "A40"),
    ("NVIDIA H100 MIG 1g.10gb", None), ("NVIDIA H200 MIG 7g.141gb", None), ("NVIDIA GeForce RTX 2080", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A1000", None),
    ("", None),
])  # fmt: skip
def test_names_of_the_driver(name: str, known: str | None) -> None:
    found = find_gpu(name)
    assert (found.name if found else None) == known


def test_each_kind_is_found_by_its_own_name_only() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


def machine_of(**gpu: object) -> Plan:
    """Plan on one GPU that NVML describes."""
    fake = FakeGpu("GPU-1", "0", "NVIDIA Future 9000", FakeMemory(80 * GIB, 80 * GIB), **gpu)  # type: ignore[arg-type]
    return plan(LLAMA_8B, find_machine("cuda", environ={}, nvml=FakeNvml([fake])), LayoutOptions())


def test_an_unknown_gpu_is_judged_by_its_memory_clock_and_bus_alone() -> None:
    planned = machine_of()
    found = estimate_speed(planned)
    assert found is not None
    assert found.one_stream == pytest.approx(speed_on("1xH200").one_stream, rel=0.05)
    assert (found.many_streams, found.first_token_s) == (None, None)
    assert "4.92 TB/s (the driver's memory clock and bus width; NVIDIA Future 9000)" in speed_lines(planned, found)[1]


def test_nothing_is_claimed_where_nothing_is_known() -> None:
    planned = machine_of(clock_mhz=None)
    assert estimate_speed(planned) is None
    assert "the bandwidth of NVIDIA Future 9000 is not known" in speed_lines(planned, None)[0]
    on_cpu = plan(LLAMA_8B, cpus(1, 80), LayoutOptions())
    assert estimate_speed(on_cpu) is None
    assert speed_lines(on_cpu, None) == []


def test_a_package_or_driver_without_the_questions_gives_no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetMemoryBusWidth")
    assert machine_of().machine.devices[0].bytes_per_s == 0


def test_estimates_have_few_digits() -> None:
    assert [number(value) for value in (0.123, 9.87, 53.17, 241.2, 2726, 17_430)] == [
        "0.12",
        "9.9",
        "53",
        "241",
        "2,730",
        "17,400",
    ]
    assert [seconds(value) for value in (0.0093, 0.0497, 0.158, 1.26, 12.3)] == [
        "9.3 ms",
        "50 ms",
        "160 ms",
        "1.3 s",
        "12 s",
    ]
