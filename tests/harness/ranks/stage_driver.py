"""Drive the stages of a model without an engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from harness.ranks.rank_threads import ThreadGroup, run_ranks
from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.model.expert_facts import ExpertSplit
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.protocol.model.placement import RankPlace, TensorPart
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.models.build import DecoderStage, build_stage, init_dummy_weights, load_weights
from mgpu.worker.sampling.sampler import gathered
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import KvCache, stored_dtype


@dataclass
class Row:
    """One request of a batch: its blocks, and how many of its tokens are in the cache."""

    blocks: list[int]
    done: int = 0


CPU = torch.device("cpu")


def make_batch(
    rows: list[tuple[Row, list[int]]], block_size: int, all_logits: bool = False, device: torch.device = CPU
) -> StepBatch:
    """Lay new tokens of some rows out as a step, and count them as done."""
    token_ids, positions, slots, starts, contexts = [], [], [], [0], []
    for row, new_ids in rows:
        places = range(row.done, row.done + len(new_ids))
        token_ids += new_ids
        positions += places
        slots += [row.blocks[place // block_size] * block_size + place % block_size for place in places]
        row.done += len(new_ids)
        starts.append(len(token_ids))
        contexts.append(row.done)
    width = max(len(row.blocks) for row, _ in rows)
    tables = [row.blocks + [0] * (width - len(row.blocks)) for row, _ in rows]
    ends = [start - 1 for start in starts[1:]]
    return StepBatch(
        rows=torch.tensor([row.blocks[0] for row, _ in rows], device=device),  # no two rows share a block here
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        logit_rows=torch.tensor(range(len(token_ids)) if all_logits else ends, device=device),
        query_lens_host=[len(new_ids) for _, new_ids in rows],
        context_lens_host=contexts,
    )


@dataclass
class Stages:
    """All stages of one tensor-parallel rank, run one after the other."""

    checkpoint: Checkpoint
    group: ThreadGroup
    splits: list[range]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    num_blocks: int = 32
    block_size: int = 4
    dummy_seed: int | None = None
    """Random weights instead of the checkpoint's."""
    quant: Quant = "none"
    kv_cache_dtype: KvCacheDtype = "auto"
    expert_split: ExpertSplit = "tensor"
    shares: tuple[int, ...] = ()
    """KV heads of each rank; empty: equally many."""
    cpu_experts: tuple[int, ...] = ()
    """Layers whose experts are on the CPU, wherever the layers are."""
    stages: list[DecoderStage] = field(init=False)
    caches: list[KvCache] = field(init=False)
    bytes_read: int = 0

    def __post_init__(self) -> None:
        facts = self.checkpoint.facts
        part = TensorPart(self.group.rank, self.group.size, self.shares)
        self.vocabulary = tuple(map(len, part.vocabulary(facts.vocab_size)))
        self.stages, self.caches = [], []
        for index, layers in enumerate(self.splits):
            place = RankPlace(self.group.rank, index, self.group.rank, self.group.size, 0, self.shares)
            where = place, layers, self.group, self.dtype, self.device
            how = self.quant, self.kv_cache_dtype, self.expert_split
            ends = index == 0, index == len(self.splits) - 1
            on_cpu = tuple(layer for layer in layers if layer in self.cpu_experts)
            stage = build_stage(facts, *where, *how, self.checkpoint.source.path, ends=ends, cpu_experts=on_cpu)
            self._fill(stage)
            sizes, types = (self.num_blocks, self.block_size, self.num_blocks), (self.dtype, self._kv_dtype)
            cache = KvCache.of_layers(facts, layers, part, sizes, types, self.device)
            for layer in cache.layers:
                layer.k_NBJK.fill_(torch.nan)
                layer.v_NBJK.fill_(torch.nan)
                if layer.states is not None:
                    layer.states.state_NHKV.fill_(torch.nan)
                    layer.states.tail_NWC.fill_(torch.nan)
            self.stages.append(stage)
            self.caches.append(cache)

    @property
    def _kv_dtype(self) -> torch.dtype:
        return stored_dtype(self.kv_cache_dtype, self.dtype)

    def _fill(self, stage: DecoderStage) -> None:
        if self.dummy_seed is None:
            self.bytes_read += load_weights(stage, self.checkpoint, lambda count: None)
        else:
            init_dummy_weights(stage, self.dummy_seed)

    def step(self, batch: StepBatch) -> Tensor:
        """Run one step through all stages; the whole vocabulary's logits of the sampling rows."""
        x_TD = self.stages[0].embed(batch.token_ids)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            x_TD = stage.run_layers(x_TD, batch, cache)
        logits = gathered(self.stages[-1].logits(x_TD[batch.logit_rows]), self.group, self.vocabulary)
        vocab_size = self.checkpoint.facts.vocab_size
        assert (logits[:, vocab_size:] == -torch.inf).all()
        return logits[:, :vocab_size]


def logits_in_chunks(
    checkpoint: Checkpoint,
    token_ids: list[int],
    chunks: list[int],
    tp_size: int = 1,
    num_stages: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    quant: Quant = "none",
    kv_cache_dtype: KvCacheDtype = "auto",
    expert_split: ExpertSplit = "tensor",
    shares: tuple[int, ...] = (),
    splits: Sequence[range] = (),
    cpu_experts: tuple[int, ...] = (),
) -> Tensor:
    """Return the logits of every token when one request is computed ``chunks`` tokens at a time.

    ``splits`` are the layers of each stage, if they are not even.
    """
    assert sum(chunks) == len(token_ids)
    total = checkpoint.facts.num_layers
    bounds = [total * index // num_stages for index in range(num_stages + 1)]
    splits = splits or [range(*pair) for pair in pairwise(bounds)]

    def work(group: ThreadGroup) -> Tensor:
        types = {"quant": quant, "kv_cache_dtype": kv_cache_dtype, "expert_split": expert_split, "shares": shares}
        stages = Stages(checkpoint, group, list(splits), dtype, device, **types, cpu_experts=cpu_experts)
        row = Row(list(range(stages.num_blocks))[::-1])  # a table that is not the identity
        parts, first = [], 0
        for count in chunks:
            batch = make_batch([(row, token_ids[first : first + count])], stages.block_size, True, device)
            parts.append(stages.step(batch).cpu())
            first += count
        return torch.cat(parts)

    results = run_ranks(tp_size, work)
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]
