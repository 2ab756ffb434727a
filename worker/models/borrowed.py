"""A stage of a family that runs through transformers' modelling code, with mgpu's attention, KV cache and ranks.

The installed library makes the model without memory (on torch's meta device). Then its parts are replaced:

    part                        replaced by
    linear layers               `ColumnParallelLinear`, `RowParallelLinear`, by the library's tensor-parallel plan
    attention function          mgpu's attention over the paged cache (borrowed_attention.py)
    embedding, head             `VocabParallel`
    layers of other stages      modules that return what they get

All else (norms, rotary embeddings, activations, what is multiplied when) is the library's own and whole on every rank.
Its forward functions see one row of T tokens with the positions of all requests of the step. Code of model folders is
never imported: the class is looked up by the name of its type in the library's own table.
"""

# T tokens, S rows that sample, D model dim, W vocabulary rows of this rank

from typing import Any

import torch
from torch import Tensor, nn

from mgpu.protocol.checkpoint.files.untrusted import CheckpointError
from mgpu.protocol.model.facts import ModelFacts
from mgpu.worker.attention.interface import AttentionShape, StepAttention
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.borrowed_attention import IMPLEMENTATION, CurrentStep, register
from mgpu.worker.models.borrowed_layers import (
    Entry,
    HeadProduct,
    NamedLinear,
    Norm,
    NormInput,
    SkippedLayer,
    replace_linears,
)
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
        self.attention_shape = self._shape_of_attention(context)
        causal = _library_model(folder, facts, self.dtype)
        base = causal.base_model
        scale = getattr(base.embed_tokens, "scalar_embed_scale", 1.0)
        self.embedding_scale = float(torch.tensor(scale, dtype=self.dtype))
        self.embedding = context.vocab() if self.is_first else None
        self.head = None
        if self.is_last:
            is_tied = self.embedding is not None and facts.tie_embeddings
            self.head = self.embedding if is_tied else context.vocab()
        self._current = CurrentStep(layers)
        norm_name = "norm" if hasattr(base, "norm") else "final_layernorm"
        self._norm = Norm(getattr(base, norm_name), f"model.{norm_name}", self.device) if self.is_last else None
        setattr(base, norm_name, nn.Identity())
        base.embed_tokens = None
        self._entry = Entry()
        for index in range(facts.num_layers):
            if index not in layers:
                skipped = self._entry if index == 0 else SkippedLayer()
                skipped.attention_type = getattr(base.layers[index], "attention_type", "")
                base.layers[index] = skipped
        self._current.attach(base)
        self._base = base.to(dtype=self.dtype)
        self._parts: list[NamedLinear] = replace_linears(base, context)
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
        """Compute what the library computes from the configuration: the frequencies of rotary embeddings."""
        for name, module in list(self._base.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                parent, _, last = name.rpartition(".")
                with torch.device(self.device):
                    setattr(self._base.get_submodule(parent), last, type(module)(config=self._base.config))

    @property
    def has_kernels(self) -> bool:
        """False: the library's code reads positions anew in each step."""
        return False

    def _shape_of_attention(self, context: BuildContext) -> AttentionShape:
        shape = super()._shape_of_attention(context)
        return AttentionShape(
            shape.num_q, shape.num_kv, shape.head_dim, shape.dtype, shape.windows, shape.kv_cache_dtype, False
        )

    def run_layers_with(self, x_TD: Tensor, attention: StepAttention, positions_T: Tensor, cache: KvCache) -> Tensor:
        """Run the layers with attention that was prepared elsewhere."""
        self._entry.x_1TD = x_TD.unsqueeze(0)
        with self._current.running(attention, cache):
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
        if self._norm is not None and self.head is not None:
            self._norm.load(reader)
            if self.head is not self.embedding:
                self.head.load(reader, "model.embed_tokens" if self.facts.tie_embeddings else "lm_head")
            self._head_product.load(reader)

    def _fill_parameters(self, reader: WeightReader) -> None:
        """Read what the library's own modules hold, whole on every rank."""
        for name, parameter in list(self._base.named_parameters()):
            if self._is_split and ".self_attn." in name and parameter.numel() != self.facts.head_dim:
                raise CheckpointError(
                    f"tensor 'model.{name}' belongs to all heads, and transformers' code cannot split it over ranks; "
                    "use one worker, or give each its own layers with -n"
                )
            parent, _, last = name.rpartition(".")
            weight = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
            reader.fill_rows(weight, f"model.{name}")
            setattr(self._base.get_submodule(parent), last, nn.Parameter(weight, requires_grad=False))

    def weight_bytes(self) -> int:
        """Return the bytes of all weights; a tied matrix counts once."""
        held = [*self._base.parameters(), *([] if self._norm is None else self._norm.parameters())]
        own: int = sum(parameter.numel() * parameter.dtype.itemsize for parameter in held)
        return super().weight_bytes() + own


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
    with torch.device("meta"):
        return (
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            ._from_config(config, attn_implementation=IMPLEMENTATION, dtype=dtype)
            .train(False)
        )
