"""Scaled rotary frequencies, read from config.json and GGUF metadata, equal those of transformers and llama.cpp."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.models.model_files import (
    LLAMA_CONFIG,
    LLAMA_METADATA,
    GgufValue,
    f32,
    gguf_bytes,
    llama_gguf_tensors,
    string,
    u32,
    write_config,
)
from mgpu.protocol.checkpoint.huggingface.config import read_config_facts
from mgpu.protocol.checkpoint.read import CheckpointError, read_checkpoint
from mgpu.protocol.checkpoint.rope.rules import llama3_divisors, yarn_divisors
from mgpu.protocol.model.attention_facts import RopeScaling
from mgpu.protocol.model.facts import ModelFacts

ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], ORIGINAL: 64,
            "long_factor": [1, 2, 3, 4, 5, 6, 7, 8]}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 64}


def facts_of(folder: Path, config: Mapping[str, object]) -> ModelFacts:
    write_config(folder, config)
    return read_config_facts(folder)


CASES: dict[str, dict[str, object]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3, original outside": {"rope_scaling": LLAMA3, ORIGINAL: 128},
    "yarn, old style": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 64}},
    "yarn, new style": {"rope_parameters": YARN | {"rope_theta": 1e6}},
    "yarn, original outside": {"rope_scaling": YARN, ORIGINAL: 64},
    "yarn, original absent": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "yarn, factor null": {"rope_scaling": YARN | {"factor": None, ORIGINAL: 64}},
    "yarn, attention factor": {"rope_scaling": YARN | {"attention_factor": 0.8}},
    "yarn, both scales": {"rope_scaling": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707}},
    "yarn, one scale": {"rope_scaling": YARN | {"mscale": 0.707}},
    "yarn, scale of 0": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, ORIGINAL: 256}},
    "yarn, betas of 0": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": None}},
    "yarn, exact range": {"rope_theta": 150000, "rope_scaling": YARN | {ORIGINAL: 4096, "truncate": False}},
    "yarn, factor of 1": {"rope_scaling": YARN | {"factor": 1.0}},
    "yarn, tiny context": {"rope_scaling": YARN | {ORIGINAL: 2}},
    "longrope": {"rope_scaling": LONGROPE},
    "longrope, original outside": {"rope_scaling": LONGROPE, ORIGINAL: 128},
    "longrope, factor": {"rope_scaling": LONGROPE | {"factor": 16.0}},
    "longrope, attention factor": {"rope_scaling": LONGROPE | {"attention_factor": 1.19}},
    "longrope, context not stretched": {"rope_scaling": LONGROPE | {ORIGINAL: 256}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_frequencies_are_those_of_transformers(tmp_path: Path, family: str, name: str) -> None:
    hf = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = (
        LLAMA_CONFIG | {"architectures": [family], "model_type": family[:-11].lower(), "head_dim": 16} | CASES[name]
    )
    facts = facts_of(tmp_path, config)
    right = hf.AutoConfig.from_pretrained(tmp_path)
    compute = ROPE_INIT_FUNCTIONS[right.rope_parameters["rope_type"]]
    scaling = facts.rope_scaling or RopeScaling((1.0,) * 8)
    for length in (2, 256):
        expected, attention = compute(right, "cpu", seq_len=length)
        plain = [facts.rope_theta ** (-2 * index / 16) for index in range(8)]
        found = [frequency / by for frequency, by in zip(plain, scaling.divisors_for(length), strict=True)]
        assert found == pytest.approx(expected.tolist(), rel=1e-5)
        assert scaling.attention_factor == pytest.approx(attention)


@pytest.mark.parametrize(("scaling", "longest"), [
    (YARN, 131072), (YARN | {ORIGINAL: 8192}, 40960),
    ({"type": "yarn", "factor": 2.0}, 81920), ({"type": "linear", "factor": 4.0}, 40960),
    ({"type": "dynamic", "factor": 4.0}, 40960), (LLAMA3, 40960), (None, 40960),
    ({"type": "yarn", "factor": 1e9}, 1 << 30),
])  # fmt: skip
def test_yarn_stretches_the_context(tmp_path: Path, scaling: object, longest: int) -> None:
    config = LLAMA_CONFIG | {"max_position_embeddings": 40960, "rope_scaling": scaling}
    assert facts_of(tmp_path, config).max_position == longest


def test_the_first_name_of_longrope(tmp_path: Path) -> None:
    both = [
        facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": LONGROPE | {"rope_type": name}})
        for name in ("su", "longrope")
    ]
    assert both[0] == both[1]


def test_long_factors_count_where_requests_are_longer_than_the_original_context(tmp_path: Path) -> None:
    scaling = facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": LONGROPE}).rope_scaling
    assert scaling is not None
    assert scaling.divisors_for(64) == tuple(LONGROPE["short_factor"])  # type: ignore[arg-type]
    assert scaling.divisors_for(65) == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@pytest.mark.parametrize(("scaling", "named"), [
    ({"type": "yarn"}, "factor"), (YARN | {"factor": -1}, "factor"), (YARN | {"beta_fast": "32"}, "beta_fast"),
    (YARN | {"truncate": 1}, "truncate"), (YARN | {"attention_factor": -0.5}, "attention_factor"),
    (YARN | {ORIGINAL: 0}, ORIGINAL), (YARN | {ORIGINAL: 1.5}, ORIGINAL), (YARN | {"factor": math.inf}, "factor"),
    (LONGROPE | {"long_factor": [1.0] * 7}, "7 entries, expected 8"),
    (LONGROPE | {"short_factor": None}, "short_factor"),
    (LONGROPE | {"short_factor": [0.0] * 8}, "short_factor"), (LONGROPE | {"short_factor": ["1"] * 8}, "short_factor"),
    (LONGROPE | {"long_factor": 4.0}, "list of numbers"), ({"type": "dynamic"}, "factor"),
    ({"type": "mrope", "mrope_section": [2, 3, 3]}, "supported: default, linear, dynamic, llama3, yarn, longrope"),
])  # fmt: skip
def test_broken_parameters_are_named(tmp_path: Path, scaling: Mapping[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": scaling})


def test_yarn_needs_a_theta_above_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="yarn needs more than 1"):
        facts_of(tmp_path, LLAMA_CONFIG | {"rope_scaling": YARN, "rope_theta": 1.0})


# -- GGUF --


def gguf_facts(
    folder: Path, given: Mapping[str, GgufValue], sets: Mapping[str, Sequence[float]] | None = None, kind: int = 0
) -> ModelFacts:
    """Read a tiny model with metadata below ``llama.rope.`` and stored divisors."""
    stored = {
        f"{name}.weight": ((len(values),), kind, struct.pack(f"<{len(values)}f", *values))
        for name, values in (sets or {}).items()
    }
    metadata = LLAMA_METADATA | {f"llama.rope.{key}": value for key, value in given.items()}
    (folder / "model.gguf").write_bytes(gguf_bytes(metadata, llama_gguf_tensors() | stored))
    return read_checkpoint(folder / "model.gguf").facts


@pytest.mark.parametrize(("given", "factor"), [
    ({"scale_linear": f32(4.0)}, 4.0), ({"scaling.factor": f32(4.0)}, 4.0), ({"scaling.type": string("linear")}, None),
    ({"scale_linear": f32(4.0), "scaling.factor": f32(2.0)}, 2.0), ({"scale_linear": f32(1.0)}, None),
    ({"scaling.factor": f32(0.0)}, None), ({"scaling.type": string("none"), "scaling.factor": f32(4.0)}, None),
    ({"scaling.type": string("linear"), "scaling.factor": f32(4.0)}, 4.0),
])  # fmt: skip
def test_a_factor_without_a_type_is_linear(tmp_path: Path, given: dict[str, GgufValue], factor: float | None) -> None:
    right = None if factor is None else RopeScaling((factor,) * 8)
    assert gguf_facts(tmp_path, given).rope_scaling == right


GGUF_YARN = {"scaling.type": string("yarn"), "scaling.factor": f32(4.0), "scaling.original_context_length": u32(64)}


@pytest.mark.parametrize(("more", "attention"), [
    ({}, 0.1 * math.log(4) + 1), ({"scaling.attn_factor": f32(0.5)}, 0.5 * (0.1 * math.log(4) + 1)),
    ({"scaling.yarn_log_multiplier": f32(0.5)}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ({"scaling.yarn_ext_factor": f32(-1.0)}, 0.1 * math.log(4) + 1),
])  # fmt: skip
def test_yarn_of_a_gguf_file(tmp_path: Path, more: dict[str, GgufValue], attention: float) -> None:
    facts = gguf_facts(tmp_path, GGUF_YARN | more)
    assert facts.rope_scaling is not None
    assert facts.rope_scaling.divisors == yarn_divisors(4.0, 64, 1e4, 16, 32.0, 1.0)
    assert facts.rope_scaling.attention_factor == pytest.approx(attention)
    assert facts.max_position == 256


def test_yarn_of_a_gguf_file_reads_its_betas_and_stretches_the_context(tmp_path: Path) -> None:
    betas = {"scaling.yarn_beta_fast": f32(8.0), "scaling.yarn_beta_slow": f32(2.0)}
    facts = gguf_facts(tmp_path, GGUF_YARN | betas | {"scaling.original_context_length": u32(128)})
    assert facts.rope_scaling is not None
    assert facts.rope_scaling.divisors == yarn_divisors(4.0, 128, 1e4, 16, 8.0, 2.0)
    assert facts.max_position == 512


STORED = llama3_divisors(32.0, 1.0, 4.0, 8192, 1e4, 16)


@pytest.mark.parametrize("values", [STORED, (0.5, *STORED[1:]), (1e9, *STORED[1:])])
def test_stored_divisors_are_used_as_they_are(tmp_path: Path, values: tuple[float, ...]) -> None:
    scaling = gguf_facts(tmp_path, {}, {"rope_freqs": values}).rope_scaling
    assert scaling is not None
    assert scaling.divisors == pytest.approx(values)


def test_stored_divisors_join_those_of_a_rule(tmp_path: Path) -> None:
    scaling = gguf_facts(tmp_path, {"scaling.factor": f32(2.0)}, {"rope_freqs": STORED}).rope_scaling
    assert scaling is not None
    assert scaling.divisors == pytest.approx([2 * value for value in STORED])


def test_divisors_of_one_are_no_scaling(tmp_path: Path) -> None:
    assert gguf_facts(tmp_path, {}, {"rope_freqs": (1.0,) * 8}).rope_scaling is None


def test_two_stored_sets_are_longrope(tmp_path: Path) -> None:
    given = {
        "scaling.type": string("longrope"),
        "scaling.attn_factor": f32(1.25),
        "scaling.original_context_length": u32(64),
    }
    sets = {"rope_factors_short": (1.0,) * 8, "rope_factors_long": (2.0,) * 8}
    assert gguf_facts(tmp_path, given, sets).rope_scaling == RopeScaling((1.0,) * 8, 1.25, (2.0,) * 8, 64)


@pytest.mark.parametrize("worst", [math.nan, math.inf, 0.0, -1.0])
def test_stored_divisors_that_are_no_divisors_are_refused(tmp_path: Path, worst: float) -> None:
    with pytest.raises(CheckpointError, match="rope_freqs"):
        gguf_facts(tmp_path, {}, {"rope_freqs": (worst, *STORED[1:])})


@pytest.mark.parametrize(("sets", "problem"), [
    ({"rope_freqs": (1.0,) * 4}, r"\[4\] instead of F32 \[8\]"),
    ({"rope_factors_short": (1.0,) * 8}, "without 'rope_factors_long"),
    ({"rope_factors_long": (1.0,) * 8}, "without 'rope_factors_short"),
    ({"rope_factors_short": (1.0,) * 8, "rope_factors_long": (1.0,) * 4}, r"\[4\] instead of F32 \[8\]"),
])  # fmt: skip
def test_stored_sets_of_another_shape_are_refused(
    tmp_path: Path, sets: dict[str, tuple[float, ...]], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        gguf_facts(tmp_path, {}, sets)


@pytest.mark.parametrize(("given", "named"), [
    ({"scaling.type": string("xpos")}, "supported: none, linear, yarn, longrope"),
    ({"scaling.factor": f32(-1.0)}, "scaling.factor"), ({"scaling.type": u32(2)}, "scaling.type"),
    (GGUF_YARN | {"scaling.yarn_ext_factor": f32(0.5)}, "yarn_ext_factor"),
    (GGUF_YARN | {"freq_base": f32(1.0)}, "yarn needs more than 1"),
    (GGUF_YARN | {"scaling.original_context_length": u32(0)}, "original_context_length"),
])  # fmt: skip
def test_broken_metadata_are_named(tmp_path: Path, given: dict[str, GgufValue], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        gguf_facts(tmp_path, given)
