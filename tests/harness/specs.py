"""Model facts, placements and worker specs for tests, each made in one place."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.models.parts import with_changes
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.facts import ModelFacts, ModelSource
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage, Transport

BLOCK_SIZE = 16


def make_facts(
    q: int = 64,
    kv: int = 8,
    layers: int = 64,
    hidden: int = 5120,
    width: int = 25600,
    head_dim: int = 128,
    vocab: int = 151936,
    context: int = 40960,
    tied: bool = False,
    architecture: str = "llama",
    **changes: Any,
) -> ModelFacts:
    """Return facts whose defaults are Qwen3-32B's sizes; ``changes`` are fields by their own names."""
    facts = ModelFacts(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=width,
        num_layers=layers,
        num_q_heads=q,
        num_kv_heads=kv,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position=context,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_local_theta=None,
        rope_scaling=None,
        sliding_window=None,
        sliding_layers=(False,) * layers,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=architecture in ("qwen3", "gemma3"),
        tie_embeddings=tied,
        activation="silu",
        embedding_scale=1.0,
        attention_scale=head_dim**-0.5,
        bos_token_id=1,
        eos_token_ids=(2,),
        checkpoint_dtype="bfloat16",
    )
    return replace(facts, **changes)


def make_plan(num_layers: int, sizes: Sequence[int]) -> PlacementPlan:
    """Split layers evenly into stages of ``sizes`` ranks."""
    bounds = [num_layers * index // len(sizes) for index in range(len(sizes) + 1)]
    stages, first = [], 0
    for index, size in enumerate(sizes):
        stages.append(Stage(bounds[index], bounds[index + 1], tuple(range(first, first + size))))
        first += size
    return PlacementPlan(tuple(stages))


def make_spec(
    model: Path | ModelFacts, sizes: Sequence[int], transport: Transport = "shared-memory", **changes: object
) -> WorkerSpec:
    """Return a CPU spec of a model on disk, or of facts alone, without endpoint, rendezvous and shared memory.

    ``changes`` are fields of the spec and of its parts.
    """
    if isinstance(model, ModelFacts):
        source, facts = ModelSource("", "safetensors"), model
    else:
        checkpoint = read_checkpoint(model)
        source, facts = checkpoint.source, checkpoint.facts
    spec = WorkerSpec(
        epoch=7,
        model=source,
        facts=facts,
        layout=Layout(make_plan(facts.num_layers, sizes), "float32", transport, transport),
        limits=StepLimits(block_size=BLOCK_SIZE, max_rows=8, max_batch_tokens=256, max_seq_len=128),
        device="cpu",
        endpoint="",
        rendezvous="",
        shared_fd=-1,
        shared_bytes=0,
        num_threads=1,
        memory_fraction=0.9,
        kv_memory=16 << 20,
        seed=1,
        worker_timeout_s=30.0,
    )
    return with_changes(spec, **changes)
