"""Whole models whose kernels are launched: shapes, formats and types, at rows between which kernels change."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.formats import FORMATS, facts_in
from mgpu.launch.bench.shapes import SHAPES, Config
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.facts import Dtype, KvCacheDtype, ModelSource
from mgpu.protocol.model.layout import Layout, StepLimits
from mgpu.protocol.model.placement import PlacementPlan, Stage
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.start.compile_ahead import compile_ahead
from mgpu.worker.start.compile_ahead.compile_ahead import CompileAhead
from mgpu.worker.steps import graph_pool

CPU = torch.device("cpu")
DEEPSEEK_V3: Config = {
    **SHAPES["V2-Lite"], "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 64,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip
"""With fewer experts than it has: no kernel asks how many there are."""
PROMPTS = (2048, 600, 300, 130, 96, 64, 40, 17, 8, 4, 3, 2)
"""Rows of products between which another kernel or another tiling is chosen."""
MANY_EXPERTS: Config = {**SHAPES["35B-A3B"], "num_experts": 512, "num_experts_per_tok": 10}
"""As many as models have whose router chooses from all of them."""
EVERY_SHAPE = {**SHAPES, "V3": DEEPSEEK_V3, "512-experts": MANY_EXPERTS}
QUANTS: dict[str, Quant] = {"dense": "none", "4": "4", "8": "8", "fp8": "fp8"}
NAMES = (*QUANTS, *filter(None, FORMATS))
DENSE_FORMATS = ("dense", "4", "8", "fp8", "GPTQ", "AWQ", "FP8-blocks")


@dataclass(frozen=True, slots=True)
class Model:
    """A shape of `mgpu-launch bench`, in a format, with activations and keys of some types."""

    shape: str
    form: str = "dense"
    dtype: Dtype = "bfloat16"
    kept: KvCacheDtype = "auto"

    @property
    def name(self) -> str:
        return f"{self.shape} {self.form} {self.dtype} {self.kept}"


MODELS: tuple[Model, ...] = (
    *(Model("8B", form) for form in NAMES),
    *(Model("30B-A3B", form) for form in NAMES),
    *(Model(shape) for shape in ("135M", "32B", "70B", "35B-A3B", "gpt-oss-20b", "V2-Lite", "gemma4-31B")),
    *(Model("32B", form) for form in DENSE_FORMATS[1:]),
    *(Model("V3", form) for form in ("dense", "FP8-blocks", "Q4_K")),
    *(Model("512-experts", dtype=dtype) for dtype in ("bfloat16", "float32")),
    *(Model(shape, kept="fp8") for shape in ("8B", "135M", "gemma4-31B")),
    *(Model(shape, form, "float16") for shape in ("8B", "30B-A3B") for form in DENSE_FORMATS),
    *(Model(shape, dtype="float32") for shape in ("135M", "8B", "30B-A3B", "35B-A3B", "V2-Lite", "gemma4-31B")),
)


class _Uncaptured:
    """Runs a graph's step once."""

    def __init__(self, device: torch.device, most: int, tries: bool = False) -> None:
        del device, most, tries

    def capture(self, length: int, forward: Callable[[Tensor], object]) -> None:
        forward(torch.zeros(length, dtype=torch.int32))


def launch(model: Model) -> None:
    """Launch the kernels of a rank that has the whole model, at every number of rows."""
    spec = _spec_of(model)
    place = spec.layout.placement.place_of(0)
    compile_ahead._PROMPTS = PROMPTS  # type: ignore[assignment]
    graph_pool.GraphPool = graph_pool.Uncaptured = _Uncaptured  # type: ignore[assignment,misc]
    with torch.inference_mode():
        CompileAhead(spec, place, CPU).launch_all()


def _spec_of(model: Model) -> WorkerSpec:
    facts = facts_in(EVERY_SHAPE[model.shape], "" if model.form in QUANTS else model.form)
    plan = PlacementPlan((Stage(0, facts.num_layers, (0,)),))
    quant = QUANTS.get(model.form, "none")
    layout = Layout(plan, model.dtype, "nccl", "nccl", quant=quant, kv_cache_dtype=model.kept)
    limits = StepLimits(block_size=64, max_rows=256, max_batch_tokens=PROMPTS[0], max_seq_len=PROMPTS[0] + 1)
    return WorkerSpec(
        epoch=0, model=ModelSource("", "dummy"), facts=facts, layout=layout, limits=limits, device="cpu", endpoint="",
        rendezvous="", shared_fd=-1, shared_bytes=0, num_threads=1, memory_fraction=0.9, kv_memory=0, seed=0,
        worker_timeout_s=30.0,
    )  # fmt: skip
