"""Compile a model's kernels side by side while ranks meet and weights are read.

What a kernel is compiled for (types, strides, which arguments are multiples of 16) follows from the code that launches
it. So that code is run: two layers of each kind, over undefined weights, with launches that compile and do not run.

This is the whole interface of the wing: `CompileAhead` and `start_triton`. Without Triton, or with one that lacks the
private functions of `triton_internals`, a worker starts as usual, and each kernel is compiled at its first launch.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from threading import Thread

import torch

from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan, WorkerSpec
from mgpu.protocol.model.kv_pools import PoolSize, has_pages
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.experts.cpu_experts import CpuExperts
from mgpu.worker.models.build import DecoderStage, build_stage, init_linear
from mgpu.worker.ranks.collectives import MeasurableGroup, absent_ranks
from mgpu.worker.sampling.sampler import Sampler
from mgpu.worker.state.allocate import make_state
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.graphs import prepare_graphs

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parents[2]
"""The worker's folder. Any file in it may decide what a kernel is compiled for, so all of them are part of the key."""
_IRRELEVANT_FIELDS = (
    "epoch", "model", "endpoint", "rendezvous", "shared_fd", "shared_bytes", "num_threads", "memory_fraction",
    "kv_memory", "seed", "worker_timeout_s",
)  # fmt: skip
"""Fields of a spec that no kernel depends on."""
_PROMPTS = (1024, 512, 128, 16)
"""Tokens of prompts. Quantized products have other kernels for 16 rows (the warm-up), for more than 64, for more than
256, and for more than 512 (the largest step, which is run to measure memory)."""


@dataclass(frozen=True)
class CompileAhead:
    """The kernels of one rank's start."""

    spec: WorkerSpec
    place: RankPlace
    device: torch.device

    @cached_property
    def group(self) -> MeasurableGroup:
        """Stands for the ranks of this stage, which have not met yet."""
        return absent_ranks(self.place.tp_rank, self.place.tp_size)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compile this rank's kernels in threads during the body; at its end they are ready to launch.

        A launch in the body waits for its own kernel only.
        """
        marker = self._marker() if uses_kernels(self.device) else None
        if marker is None or marker.exists() or not self._starts_triton():
            yield
            return
        from mgpu.worker.start.compile_ahead import triton_internals

        with triton_internals.compiling(self.device, self.spec.ranks_here) as outcome:
            with triton_internals.compile_only():
                has_launched_all = self._try_launching()
            yield
        if has_launched_all and outcome.is_complete:
            with suppress(OSError):  # the next start then compiles again
                marker.touch()

    def _marker(self) -> Path | None:
        """Return the file that exists once Triton's cache has all kernels; None if this Triton cannot compile ahead."""
        try:
            from mgpu.worker.start.compile_ahead import triton_internals

            triton_internals.require()
            return triton_internals.cache_folder() / f"mgpu-{self._key()}"
        except Exception as error:  # another Triton
            log.warning("kernels are compiled one by one: %s: %s", type(error).__name__, error)
            return None

    def _starts_triton(self) -> bool:
        """Return whether Triton can compile. To know takes half a second, so a start with all kernels does not ask."""
        try:
            from mgpu.worker.start.compile_ahead import triton_internals

            triton_internals.start_driver()
            return True
        except Exception as error:  # such as no C compiler: the check of attention says what that means
            log.warning("kernels are compiled one by one: %s: %s", type(error).__name__, error)
            return False

    def _key(self) -> str:
        """Return a hash of everything that kernels depend on."""
        import triton

        names = (field.name for field in fields(self.spec) if field.name not in _IRRELEVANT_FIELDS)
        spec = {name: getattr(self.spec, name) for name in names}
        code = [file.read_bytes() for file in sorted(SOURCES.rglob("*.py"))]
        device = torch.cuda.get_device_capability(self.device)
        facts = (triton.__version__, torch.__version__, device, self.place.rank, spec)
        return hashlib.sha256(b"".join([repr(facts).encode(), *code])).hexdigest()[:32]

    @torch.inference_mode()
    def _try_launching(self) -> bool:
        """Return whether every kernel was launched."""
        try:
            self.launch_all()
            return True
        except Exception as error:  # the start itself will meet a real fault; any other only costs time
            log.warning("kernels cannot be compiled ahead: %s: %s", type(error).__name__, error)
            return False

    def launch_all(self) -> None:
        """Launch every kernel that a start launches."""
        from mgpu.worker.attention.check import launch_check
        from mgpu.worker.ranks.peer_setup import launch_trial

        launch_trial(self.spec, self.place, self.device)  # first, since ranks that meet wait for it
        kinds = self._two_of_each_kind()
        stage = self._short_stage(kinds)
        launch_check(self.device, stage.attention_shape)
        num_states = min(self.spec.limits.max_rows, 2)
        limits, blocks = self.spec.limits, -(-(_PROMPTS[0] + 1) // self.spec.limits.block_size)
        pool = PoolSize(blocks, blocks if has_pages(self.spec.facts.sight, limits) else 0)
        rows, cache = make_state(self.spec, self.place, self.device, pool, kinds, num_states)
        self._run_steps(stage, rows, cache)
        if self.spec.layout.placement.num_stages == 1:
            prepare_graphs(stage, cache, rows, self.group)

    def _two_of_each_kind(self) -> list[int]:
        """Return two layers of each kind that this rank has, or one.

        The first norm of a layer adds up what the experts of the layer before have computed.
        """
        facts, own = self.spec.facts, self.spec.layout.placement.stages[self.place.stage_index]
        kinds = {
            (
                facts.sliding_layers[layer],
                facts.kind_of(layer),
                facts.formats[layer : layer + 1],
                layer in self.spec.layout.cpu_experts,
            ): layer
            for layer in range(own.first_layer, own.end_layer)
        }
        return ([*kinds.values()] * 2)[: own.num_layers]

    def _short_stage(self, kinds: list[int]) -> DecoderStage:
        """Build this rank's stage with some layers of this rank and undefined weights."""
        spec, facts = self.spec, self.spec.facts
        own = spec.layout.placement.stages[self.place.stage_index]
        # A layer before and one after stand for those of other stages: what they are does not matter.
        before, after = own.first_layer > 0, own.end_layer < facts.num_layers
        short = facts.with_layers([*[0] * before, *kinds, *[0] * after])
        layers = range(int(before), int(before) + len(kinds))
        dtype: torch.dtype = getattr(torch, spec.layout.dtype)
        where = self.place, layers, self.group, dtype, self.device
        layout = spec.layout
        how = layout.quant, layout.kv_cache_dtype, layout.expert_split, spec.model.path
        on_cpu = tuple(at for at, layer in zip(layers, kinds, strict=True) if layer in layout.cpu_experts)
        ends = layout.placement.ends_of(self.place.stage_index)
        stage = build_stage(short, *where, *how, ends=ends, cpu_experts=on_cpu)
        for _, part in stage.named_modules():
            if isinstance(part, CpuExperts):
                part.is_idle = True
        stage.max_positions = spec.limits.max_seq_len + 1
        stage.assume_kernels()
        if spec.layout.quant != "none" or facts.formats:
            init_linear(stage)
            stage.finalize()
        return stage

    def _run_steps(self, stage: DecoderStage, rows: RowTable, cache: KvCache) -> None:
        """Run the steps of `ModelRunner.warm_up` that use no graph. All tokens are 0, since nothing is sampled."""
        facts = self.spec.facts
        sampler = Sampler(rows, self.group, tuple(map(len, self.place.part.vocabulary(facts.vocab_size))))
        blocks = [*range(min(cache.num_blocks, rows.blocks.shape[1]))]
        most = min(self.spec.limits.max_batch_tokens, self.spec.limits.max_seq_len - 1)
        new = NewRow(0, bytes(4 * most), most, blocks, RowSampling(temperature=1.0))
        rows.apply(StepPlan(0, 0, [], [new], [], [], [], [], [], []))
        for start, count in (*((0, min(count, most)) for count in _PROMPTS), (1, 1)):
            plan = StepPlan(0, 0, [], [], [], [], [0], [start], [count], [1])
            batch, request = rows.batch(plan)
            assert request is not None
            if stage.is_first:
                x_TD = stage.embed(batch.token_ids)
            else:
                x_TD = torch.zeros((count, facts.hidden_size), dtype=stage.dtype, device=self.device)
            x_TD = stage.run_layers(x_TD, batch, cache)
            if stage.is_last:
                sampler.sample(stage.logits(x_TD[batch.logit_rows]), request)


def start_triton(device: torch.device) -> None:
    """Import Triton and start its driver in a thread, while the caller starts CUDA."""
    if uses_kernels(device):
        Thread(target=_start_triton, name="start-triton", daemon=True).start()


def _start_triton() -> None:
    try:
        from mgpu.worker.start.compile_ahead.triton_internals import start_driver

        start_driver()
    except Exception as error:  # the check of attention uses the same driver and says what that means
        log.info("Triton did not start: %s", error)
