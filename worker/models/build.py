"""Build a stage of any supported model, and load or draw its weights."""

import zlib
from collections.abc import Callable

import torch

from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import KvCacheDtype, ModelFacts
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.quantization import Quant, weight_format
from mgpu.worker.layers.experts.cpu_experts import HostRows
from mgpu.worker.layers.experts.experts import ExpertMatrices
from mgpu.worker.layers.linear import Linear, Storage
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.loaders.copiers import reading_threads
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.borrowed import BorrowedStage
from mgpu.worker.models.gemma3 import Gemma3Layer
from mgpu.worker.models.gemma4 import Gemma4Layer
from mgpu.worker.models.granite import GraniteLayer
from mgpu.worker.models.hybrid import HybridLayer
from mgpu.worker.models.llama import LlamaLayer
from mgpu.worker.models.olmo import OlmoLayer
from mgpu.worker.models.stage import WEIGHT_HOLDERS, BuildContext, DecoderStage, Ends, LayerFactory
from mgpu.worker.ranks.collectives import TensorParallelGroup

__all__ = ["DecoderStage", "build_stage", "init_dummy_weights", "init_linear", "load_weights"]

_LAYERS: dict[str, LayerFactory] = {
    "granite": GraniteLayer, "granitemoe": GraniteLayer, "granitemoeshared": GraniteLayer,
    "olmo2": OlmoLayer, "olmo3": OlmoLayer,
    "gemma2": Gemma3Layer, "gemma3": Gemma3Layer, "gemma4": Gemma4Layer,
    "qwen3_next": HybridLayer, "qwen3_5": HybridLayer, "qwen3_5_moe": HybridLayer,
}  # fmt: skip
"""Families that are wired in another way than Llama's."""


def build_stage(
    facts: ModelFacts,
    place: RankPlace,
    layers: range,
    group: TensorParallelGroup,
    dtype: torch.dtype,
    device: torch.device,
    quant: Quant = "none",
    kv_cache_dtype: KvCacheDtype = "auto",
    expert_split: ExpertSplit = "tensor",
    folder: str = "",
    ends: Ends | None = None,
    cpu_experts: tuple[int, ...] = (),
) -> DecoderStage:
    """Allocate one rank's part of a model on its device, with undefined weights.

    ``folder`` has config.json, if transformers' code runs the model. ``ends`` says whether the stage embeds and whether
    it has the head; None: its layers say so. ``cpu_experts``: the layers whose experts are on the CPU.

    Linear weights that will be quantized get their memory when they are loaded, one after the other.
    """
    assert (group.rank, group.size) == (place.tp_rank, place.tp_size), "the group is not this rank's stage"
    storage = Storage(dtype, device, weight_format(quant))
    how = kv_cache_dtype, expert_split, place.shares, ends
    context = BuildContext(facts, group, storage, *how, cpu_experts, HostRows(device) if cpu_experts else None)
    if facts.borrowed is not None:
        return BorrowedStage(context, layers, folder)
    make_layer = _LAYERS.get(facts.architecture, LlamaLayer)
    return DecoderStage(context, layers, make_layer, norms_unit_offset=make_layer in (Gemma3Layer, HybridLayer))


@torch.inference_mode()
def load_weights(
    stage: DecoderStage, checkpoint: Checkpoint, progress: Callable[[int], None], ranks_here: int = 1
) -> int:
    """Read this rank's bytes of every weight and return their number; ``progress`` is called with counts of new ones.

    Needs little memory beside the stage's own. The ``ranks_here`` ranks of this machine share its cores.
    CheckpointError when a tensor cannot be read.
    """
    with WeightReader(checkpoint, progress, stage.device, reading_threads(ranks_here)) as reader:
        stage.load(reader)
    stage.finalize()
    return reader.bytes_read


def init_linear(stage: DecoderStage) -> None:
    """Draw weights of linear layers, experts and packed rows of the vocabulary: they have no memory until then.

    Experts on the CPU beside a GPU are left out.
    """
    for _, module in stage.named_modules():
        if isinstance(module, ExpertMatrices) and module.weight.device.type != stage.device.type:
            continue
        if isinstance(module, (Linear, ExpertMatrices)) or (isinstance(module, VocabParallel) and module.is_packed):
            module.init_dummy(torch.Generator(module.weight.device))


@torch.inference_mode()
def init_dummy_weights(stage: DecoderStage, seed: int) -> None:
    """Fill the weights with noise of a sensible scale; the same for the same seed and layout."""
    for name, module in stage.named_modules():
        if isinstance(module, WEIGHT_HOLDERS):
            generator = torch.Generator(module.weight.device)
            # The CPU generator uses only 32 bits of a seed, so name and seed must both be mixed into those.
            generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            module.init_dummy(generator)
    if isinstance(stage, BorrowedStage):
        stage.draw_others(torch.Generator(stage.device).manual_seed(seed & 0xFFFFFFFF))
    stage.finalize()
