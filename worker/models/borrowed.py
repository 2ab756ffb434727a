"""A stage of a family that runs through transformers' modelling code, with mgpu's attention, KV cache and ranks.

The installed library makes the model without memory (on torch's meta device). Then its parts are replaced:

    part                        replaced by
    linear layers               `ColumnParallelLinear`, `RowParallelLinear`, by the library's tensor-parallel plan
    attention function          mgpu's attention over the paged cache (borrowed_attention.py)
    experts                     `Experts`, split as `--experts` says (borrowed_experts.py)
    RMS norms                   mgpu's (borrowed_norms.py)
    embedding, head             `VocabParallel`
    layers of other stages      modules that return what they get

All else (routers, other norms, rotary embeddings, activations, what is multiplied when) is the library's own and whole
on every rank.
Its forward functions see one row of T tokens with the positions of all requests of the step. Code of model folders is
never imported: the class is looked up by the name of its type in the library's own table.
"""

# T tokens, S rows that sample, D model dim, W vocabulary rows of this rank

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.facts import ModelFacts
from mgpu.worker.attention.interface import AttentionShape, StepAttention
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.borrowed_attention import IMPLEMENTATION, CurrentStep, register
from mgpu.worker.models.borrowed_experts import NamedExperts, replace_experts
from mgpu.worker.models.borrowed_layers import (
    Entry,
    HeadProduct,
    NamedLinear,
    NormInput,
    SkippedLayer,
    replace_linears,
)
from mgpu.worker.models.borrowed_norms import NamedNorm, replace_norms
from mgpu.worker.models.stage import BuildContext, DecoderStage
from mgpu.worker.state.kv_cache import KvCache


class BorrowedStage(DecoderStage):
    """Some layers of a transformers model on one rank."""

    def __init__(self, context: BuildContext, layers: range, folder: str) -> None:
        facts = context.facts
        self.facts, self.layer_range = facts, layers
        self._is_split = context.group.size > 1
        self.dtype, self.device = context.storage.dtype, context.storage.device
        self.max_positions = facts.max_position
        self.is_first, self.is_last = context.ends_of(layers)
        causal = _library_model(folder, facts, self.dtype)
        base = causal.base_model
        self.attention_shape = _attention_shape(self._shape_of_attention(context), base.config)
        scale = getattr(base.embed_tokens, "scalar_embed_scale", 1.0)
        self.embedding_scale = float(torch.tensor(scale, dtype=self.dtype))
        self.embedding = context.vocab() if self.is_first else None
        self.per_layer = None
        self.head = None
        if self.is_last:
            is_tied = self.embedding is not None and facts.tie_embeddings
            self.head = self.embedding if is_tied else context.vocab()
        self._current = CurrentStep(layers)
        self._norm_name = "norm" if hasattr(base, "norm") else "final_layernorm"
        if not self.is_last:
            setattr(base, self._norm_name, nn.Identity())
        base.embed_tokens = None
        self._entry = Entry()
        for index in range(facts.num_layers):
            if index not in layers:
                skipped = self._entry if index == 0 else SkippedLayer()
                skipped.attention_type = getattr(base.layers[index], "attention_type", "")
                base.layers[index] = skipped
        self._current.attach(base)
        self._base = base
        self._float32_parts = tuple(causal._keep_in_fp32_modules_strict or ())
        norms = replace_norms(base, context.storage, "model.")
        for part in norms:
            self._check_whole(part.name, part.norm.weight.numel())
        experts = replace_experts(base, context)
        self._parts: list[NamedLinear | NamedNorm | NamedExperts] = [*norms, *experts, *replace_linears(base, context)]
        self._norm = getattr(base, self._norm_name) if self.is_last else None
        setattr(base, self._norm_name, nn.Identity())
        self._fill_buffers()
        self._causal = self._head_code(causal)

    def _head_code(self, causal: Any) -> Any:
        """Let the library's class compute logits only: from the normalized rows, with this rank's part of the head."""
        if self.head is None:
            return None
        bias = getattr(causal.lm_head, "bias", None)
        self._head_product = HeadProduct(self.head, bias is not None, self.device)
        self._normalized = NormInput()
        causal.lm_head = self._head_product
        setattr(causal, causal.base_model_prefix, self._normalized)
        return causal

    def _fill_buffers(self) -> None:
        """Compute what the library computes from the configuration: the frequencies of rotary embeddings.

        Other buffers are stored in the checkpoint, and are read as weights are.
        """
        stored = self._base.state_dict().keys()
        for name, module in list(self._base.named_modules()):
            if any(f"{name}.{buffer}" not in stored for buffer, _ in module.named_buffers(recurse=False)):
                parent, _, last = name.rpartition(".")
                with torch.device(self.device):
                    setattr(self._base.get_submodule(parent), last, type(module)(config=self._base.config))

    def run_layers_with(self, x_TD: Tensor, attention: StepAttention, positions_T: Tensor, cache: KvCache) -> Tensor:
        """Run the layers with attention that was prepared elsewhere."""
        self._entry.x_1TD = x_TD.unsqueeze(0)
        with self._current.running(attention, cache, self.max_positions):
            done = self._base(inputs_embeds=self._entry.x_1TD, position_ids=positions_T.unsqueeze(0), use_cache=False)
        x_1TD: Tensor = done.last_hidden_state
        return x_1TD[0]

    def raw_logits(self, x_SD: Tensor) -> Tensor:
        """Return this rank's part of the logits in the model's dtype."""
        assert self._norm is not None, "only the last stage has the norm and the head"
        assert self.head is not None
        self._normalized.x_1SD = self._norm(x_SD).unsqueeze(0)
        logits_SW: Tensor = self._causal(input_ids=None, use_cache=False).logits[0]
        if self.head.num_valid < logits_SW.shape[1]:  # the library may have scaled or capped the padding
            logits_SW[:, self.head.num_valid :] = -torch.inf
        return logits_SW

    def load(self, reader: WeightReader) -> None:
        """Fill every weight from the checkpoint."""
        if self.embedding is not None:
            self.embedding.load(reader, "model.embed_tokens")
        for part in self._parts:
            part.load(reader)
        self._fill_parameters(reader)
        if self.head is not None:
            if self.head is not self.embedding:
                self.head.load(reader, "model.embed_tokens" if self.facts.tie_embeddings else "lm_head")
            self._head_product.load(reader)

    def _fill_parameters(self, reader: WeightReader) -> None:
        """Read what the library's own modules hold, whole on every rank."""
        for name, weight in self._allocate():
            reader.fill_rows(weight, f"model.{name}")

    def draw_others(self, generator: torch.Generator) -> None:
        """Draw what the library's own modules hold: vectors of weights are 1 and biases 0."""
        for name, weight in self._allocate():
            if weight.dim() > 1:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            else:
                weight.fill_(float(name.endswith("weight")))

    def _allocate(self) -> Iterator[tuple[str, Tensor]]:
        """Allocate what the library's own modules read from the checkpoint, and yield each with its name."""
        own = [(self._base, "", name) for name in self._base.state_dict()]
        if self._norm is not None:
            own += [(self._norm, f"{self._norm_name}.", name) for name in self._norm.state_dict()]
        for module, prefix, name in own:
            parent, _, last = name.rpartition(".")
            holder = module.get_submodule(parent)
            former = getattr(holder, last)
            self._check_whole(f"model.{prefix}{name}", former.numel())
            is_weight = isinstance(former, nn.Parameter)
            dtype = self.dtype if is_weight and not self._is_float32(name) else torch.float32
            weight = torch.empty(former.shape, dtype=dtype, device=self.device)
            setattr(holder, last, nn.Parameter(weight, requires_grad=False) if is_weight else weight)
            yield f"{prefix}{name}", weight

    def _is_float32(self, name: str) -> bool:
        """Return whether the library keeps a weight in float32 whatever the model's type is."""
        return any(part in name for part in self._float32_parts)

    def _check_whole(self, name: str, elements: int) -> None:
        """Raise CheckpointError for weights that belong to all heads, if ranks have some of them each."""
        if self._is_split and ".self_attn." in name and elements != self.facts.head_dim:
            raise CheckpointError(
                f"tensor '{name}' belongs to all heads, and transformers' code cannot split it over ranks; "
                "use one worker, or give each its own layers with -n"
            )

    def weight_bytes(self) -> int:
        """Return the bytes of all weights; a tied matrix counts once."""
        held = [*self._base.parameters(), *([] if self._norm is None else self._norm.parameters())]
        own: int = sum(parameter.numel() * parameter.dtype.itemsize for parameter in held)
        return super().weight_bytes() + own


def _attention_shape(shape: AttentionShape, config: Any) -> AttentionShape:
    """Return what kernels must support, from the library's configuration: facts do not say it of a borrowed family."""
    window = getattr(config, "sliding_window", None)
    windows = (None, window) if isinstance(window, int) and window > 0 else (None,)
    return replace(shape, windows=windows, has_plain_scores=not getattr(config, "attn_logit_softcapping", None))


def _library_model(folder: str, facts: ModelFacts, dtype: torch.dtype) -> Any:
    """Make the model of the library's class, without memory for weights."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    register()
    if facts.architecture not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder}: the installed transformers does not know {facts.architecture!r}; type: "
            "pip install -U transformers"
        )
    config = CONFIG_MAPPING[facts.architecture].from_pretrained(folder, local_files_only=True)
    if config.num_hidden_layers != facts.num_layers:  # a part of the model, to compile its kernels
        config.num_hidden_layers = facts.num_layers
        config.layer_types = (getattr(config, "layer_types", None) or [])[: facts.num_layers] or None
    with torch.device("meta"):
        return (
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            ._from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype)
            .train(False)
        )
