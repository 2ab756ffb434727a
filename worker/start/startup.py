"""What a worker does before its first step: load the weights, measure the memory that is left, allocate the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from mgpu.protocol.checkpoint.read import Checkpoint, read_checkpoint
from mgpu.protocol.internal.worker_messages import Loaded, RowSampling, WorkerSpec
from mgpu.protocol.model.kv_pools import PoolSize
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import DecoderStage, build_stage, init_dummy_weights, load_weights
from mgpu.worker.ranks.links import Links
from mgpu.worker.sampling.sampler import Sampler
from mgpu.worker.start.pool_size import cpu_pool_bytes, cuda_pool_bytes, pools_of
from mgpu.worker.state.allocate import make_state
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import KvCache, block_bytes, stored_dtype
from mgpu.worker.state.rows import RowTable, SampleRequest
from mgpu.worker.steps.model_runner import ModelRunner

_GRAPH_BYTES = 256 << 20
"""Bound of what CUDA graphs take beside activations."""

Progress = Callable[[int, int], None]
"""Called with the bytes that were read and those of the whole load."""


class StartUp:
    """Turns one rank's spec into a `ModelRunner`: `load`, then `measure`, then `allocate`."""

    def __init__(self, spec: WorkerSpec, place: RankPlace, device: torch.device, links: Links) -> None:
        self._spec = spec
        self._place = place
        self._device = device
        self._links = links
        self._dtype: torch.dtype = getattr(torch, spec.layout.dtype)
        self._kv_dtype = stored_dtype(spec.layout.kv_cache_dtype, self._dtype)
        self._own = spec.layout.placement.stages[place.stage_index]
        self._layers = range(self._own.first_layer, self._own.end_layer)
        self._vocabulary = tuple(map(len, place.part.vocabulary(spec.facts.vocab_size)))

    def load(self, progress: Progress) -> tuple[DecoderStage, int]:
        """Build this rank's stage and load its weights; return it and the bytes read."""
        spec = self._spec
        where = self._place, self._layers, self._links.group, self._dtype, self._device
        layout = spec.layout
        how = layout.quant, layout.kv_cache_dtype, layout.expert_split
        ends = spec.layout.placement.ends_of(self._place.stage_index)
        on_cpu = layout.cpu_experts_of(self._place.stage_index)
        stage = build_stage(spec.facts, *where, *how, folder=spec.model.path, ends=ends, cpu_experts=on_cpu)
        stage.max_positions = spec.limits.max_seq_len + 1
        if spec.model.load_format == "dummy":
            init_dummy_weights(stage, spec.seed)
            return stage, 0
        checkpoint = read_checkpoint(spec.model.path, spec.model.load_format, spec.model.code)
        total = bytes_to_read(checkpoint, stage, self._place.tp_size)
        done = 0

        def add(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(min(done, total), total)

        return stage, load_weights(stage, checkpoint, add, ranks_here=spec.ranks_here)

    def measure(self, stage: DecoderStage) -> Loaded:
        """Return how many blocks this rank could hold, and its other sizes. OutOfMemory if it could hold none."""
        spec = self._spec
        linear, facts = spec.facts.count_linear(self._layers), spec.facts
        window = [layer for layer in self._layers if facts.sliding_layers[layer]]
        others = [layer for layer in self._layers if not facts.sliding_layers[layer]]
        per_block, per_page = (
            block_bytes(facts, layers, self._place.part, spec.limits.block_size, self._kv_dtype)
            for layers in (others, window)
        )
        if self._device.type == "cuda":
            pool = cuda_pool_bytes(spec, self._device, self._place.device, lambda: self.run_largest_step(stage))
            if not spec.kv_memory:
                pool -= self._graph_bytes()
        else:
            pool = cpu_pool_bytes(spec)
        if facts.linear is not None:
            per_row = facts.linear.state_bytes(linear, self._place.tp_size, self._dtype.itemsize)
            pool -= (spec.limits.max_rows + spec.limits.num_snapshots) * per_row
        blocks, pages = pools_of(spec, pool, per_block, per_page)
        in_block = per_block if pages else per_block + per_page
        return Loaded(spec.epoch, self._place.rank, blocks, in_block, stage.weight_bytes(), pool, pages)

    def _graph_bytes(self) -> int:
        """Bound what the CUDA graphs of decode steps will hold: activations, logits, and the graphs themselves."""
        facts = self._spec.facts
        per_row = self._dtype.itemsize * (8 * facts.hidden_size + 4 * facts.intermediate_size + facts.vocab_size)
        return 2 * self._spec.limits.max_rows * per_row + _GRAPH_BYTES

    def allocate(self, stage: DecoderStage, pool: PoolSize) -> ModelRunner:
        """Allocate the pools and the rows."""
        limits = self._spec.limits
        rows, cache = self._state(pool, limits.max_rows + limits.num_snapshots)
        num_stages = self._spec.layout.placement.num_stages
        return ModelRunner(stage, cache, rows, self._links, self._spec.facts, self._place, num_stages)

    def _state(self, pool: PoolSize, num_states: int) -> tuple[RowTable, KvCache]:
        """Allocate rows, and what the layers keep of them."""
        return make_state(self._spec, self._place, self._device, pool, self._layers, num_states)

    @torch.inference_mode()
    def run_largest_step(self, stage: DecoderStage) -> None:
        """Run the largest step there can be, without the other ranks, on a pool of one block."""
        self._links.group.alone = True
        rows, cache = self._state(PoolSize(1), 1)
        batch = self._largest_batch()
        if stage.is_first:
            x_TD = stage.embed(batch.token_ids)
        else:
            shape = (len(batch.token_ids), self._spec.facts.hidden_size)
            x_TD = torch.zeros(shape, dtype=self._dtype, device=self._device)
        x_TD = stage.run_layers(x_TD, batch, cache)
        if stage.is_last:
            self._sample_most(rows, stage.logits(x_TD[: self._spec.limits.max_rows]))
        self._links.group.alone = False

    def _sample_most(self, rows: RowTable, logits_SV: Tensor) -> None:
        """Choose a token for each row, with every rule that takes memory."""
        count = len(logits_SV)
        sampling = [RowSampling(temperature=1.0, top_p=0.9, num_logprobs=1)] * count
        numbers = torch.arange(count, device=self._device)
        request = SampleRequest([*range(count)], [1] * count, sampling, numbers, torch.ones_like(numbers))
        Sampler(rows, self._links.group, self._vocabulary).sample(logits_SV, request)

    def _largest_batch(self) -> StepBatch:
        """Return a step of as many tokens as possible: the last ones of rows of full length."""
        limits, device = self._spec.limits, self._device
        longest = limits.max_seq_len
        counts = [longest] * (limits.max_batch_tokens // longest)
        if rest := limits.max_batch_tokens % longest:
            counts.append(rest)
        positions = torch.cat([torch.arange(longest - count, longest, device=device) for count in counts])
        ends = torch.tensor([0, *counts], device=device).cumsum(0)
        contexts = [longest] * len(counts)
        return StepBatch(
            rows=torch.zeros(len(counts), dtype=torch.int64, device=device),
            token_ids=torch.zeros_like(positions),
            positions=positions,
            slots=positions % limits.block_size,
            query_starts=ends.to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.zeros((len(counts), -(-longest // limits.block_size)), dtype=torch.int32, device=device),
            logit_rows=ends[1:] - 1,
            query_lens_host=counts,
            context_lens_host=contexts,
        )


def bytes_to_read(checkpoint: Checkpoint, stage: DecoderStage, tp_size: int) -> int:
    """Estimate what one rank reads, for a progress bar: its layers' bytes over the ranks of its stage."""
    prefixes = [f"model.layers.{index}." for index in stage.layer_range]
    if stage.is_first or stage.facts.tie_embeddings:
        prefixes += ["model.embed_tokens.", "model.embed_tokens_per_layer.", "model.per_layer_"]
    if stage.is_last:
        prefixes += ["model.norm.", "lm_head."]
    wanted = tuple(prefixes)
    return sum(entry.nbytes for name, entry in checkpoint.tensors.items() if name.startswith(wanted)) // tp_size
