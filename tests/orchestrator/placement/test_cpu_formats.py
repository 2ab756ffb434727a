"""What a CPU computes in, and which matrices of a GGUF file stay packed on it."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.machines import QWEN3_32B, cpus, gpus
from mgpu.orchestrator.placement.machine.cpu_features import cpu_flags, multiplies_bfloat16, multiplies_packed
from mgpu.orchestrator.placement.machine.devices import Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.protocol.model.expert_facts import ExpertFacts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, uniform

Q4_K, Q6_K, Q4_1, Q8_0 = (GGUF_FORMATS[name] for name in ("Q4_K", "Q6_K", "Q4_1", "Q8_0"))
NEW = frozenset({"avx2", "avx512f", "avx512_bf16"})
OLD = frozenset({"avx2"})


def machine(flags: frozenset[str]) -> Machine:
    return replace(cpus(1, 512), cpu_flags=flags)


def with_formats(layer: LayerFormats) -> ModelFacts:
    return replace(QWEN3_32B, formats=(layer,) * QWEN3_32B.num_layers)


@pytest.mark.parametrize(
    ("flags", "dtype"), [(NEW, "bfloat16"), (frozenset({"amx_bf16"}), "bfloat16"), (OLD, "float32")]
)
def test_a_cpu_computes_in_bfloat16_if_it_multiplies_it(flags: frozenset[str], dtype: str) -> None:
    assert plan(QWEN3_32B, machine(flags), LayoutOptions()).layout.dtype == dtype
    assert plan(QWEN3_32B, machine(flags), LayoutOptions(dtype="float32")).layout.dtype == "float32"


def test_the_flags_of_the_host_change_nothing_for_gpus() -> None:
    box = replace(gpus(80), cpu_flags=OLD)
    assert plan(QWEN3_32B, box, LayoutOptions()).layout.dtype == "bfloat16"
    assert plan(with_formats(uniform(Q6_K)), box, LayoutOptions()).facts.formats[0].down == Q6_K


def test_matrices_of_4_bits_stay_packed_and_others_are_widened() -> None:
    mixed = LayerFormats(Q4_K, Q4_K, Q4_1, Q6_K, qkv_parts=(Q4_K, Q4_K, Q6_K))
    made = plan(with_formats(mixed), machine(NEW), LayoutOptions())
    assert made.facts.formats[0] == LayerFormats(out=Q4_K, gate_up=Q4_1)
    parts = LayerFormats(qkv_parts=(Q4_K, Q4_K, Q4_1))
    assert plan(with_formats(parts), machine(NEW), LayoutOptions()).facts.formats[0] != LayerFormats()


def test_where_workers_compile_their_kernels_8_bits_stay_packed_too_and_so_do_embedding_and_head() -> None:
    facts = replace(with_formats(LayerFormats(Q8_0, Q4_1, Q8_0, Q6_K)), embedding_format=Q8_0, head_format=Q8_0)
    new = replace(machine(NEW), has_compiler=True)
    made = plan(facts, new, LayoutOptions()).facts
    assert (made.embedding_format, made.head_format) == (Q8_0, Q8_0)
    assert made.formats[0] == LayerFormats(Q8_0, Q4_1, Q8_0)
    six_bits = replace(facts, embedding_format=Q6_K, head_format=Q6_K)
    for other in (plan(six_bits, new, LayoutOptions()), plan(facts, new, LayoutOptions(dtype="float32"))):
        assert (other.facts.embedding_format, other.facts.head_format) == (DENSE, DENSE)
    without = plan(facts, machine(NEW), LayoutOptions()).facts
    assert (without.embedding_format, without.formats[0]) == (DENSE, LayerFormats(out=Q4_1))


def test_where_workers_compile_their_kernels_experts_and_values_of_a_table_stay_packed() -> None:
    nl4, fp4 = GGUF_FORMATS["IQ4_NL"], GGUF_FORMATS["MXFP4"]
    experts = ExpertFacts(8, 2, 768, (True,) * QWEN3_32B.num_layers, normalizes=True)
    facts = replace(with_formats(LayerFormats(nl4, Q4_1, fp4, Q4_K)), experts=experts)
    made = plan(facts, replace(machine(NEW), has_compiler=True), LayoutOptions()).facts
    assert made.formats[0] == LayerFormats(nl4, Q4_1, fp4, Q4_K)
    assert plan(facts, machine(NEW), LayoutOptions()).facts.formats[0] == LayerFormats(out=Q4_1)


@pytest.mark.parametrize(
    ("flags", "dtype", "layer"),
    [
        (NEW, "float32", uniform(Q4_K)),
        (NEW, "float16", uniform(Q4_K)),
        (frozenset[str](), "bfloat16", uniform(Q4_K)),
        (NEW, "bfloat16", uniform(Q6_K)),
    ],
    ids=["exact", "float16", "no vectors", "6 bits"],
)
def test_a_file_is_widened_where_torch_multiplies_nothing_of_it(
    flags: frozenset[str], dtype: str, layer: LayerFormats
) -> None:
    made = plan(with_formats(layer), machine(flags), LayoutOptions(dtype=dtype))
    assert made.facts.formats == ()


def test_a_file_in_bfloat16_takes_its_own_bytes_on_a_cpu() -> None:
    made = plan(with_formats(uniform(Q4_1)), machine(OLD), LayoutOptions(dtype="bfloat16"))
    dense = plan(QWEN3_32B, machine(OLD), LayoutOptions(dtype="bfloat16"))
    assert made.rows[0].weight_bytes < 0.4 * dense.rows[0].weight_bytes
    assert DENSE not in (made.facts.formats[0].down, made.facts.formats[0].qkv)


def test_flags_are_read_from_the_kernels_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    listed = tmp_path / "cpuinfo"
    listed.write_text("model name : x\nflags\t\t: fpu avx2 avx512_bf16\nprocessor : 1\nflags\t: none\n")
    flags = cpu_flags(listed)
    assert multiplies_bfloat16(flags)
    assert multiplies_packed(flags)
    assert cpu_flags(tmp_path / "missing") == frozenset()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_flags(tmp_path / "other") == frozenset()
