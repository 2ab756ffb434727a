"""A scheduler and the model of one worker in one process: requests as a server runs them, without its processes."""

from collections import deque
from dataclasses import dataclass, replace

import torch

from harness.answers.greedy_runner import alone
from harness.scheduler_driver import submit_of
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.orchestrator.scheduler.scheduler import Scheduler
from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.internal.worker_messages import RowSampling, StepResult, TokenLogprobs
from mgpu.protocol.model.kv_pools import PoolSize
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.models.build import DecoderStage, build_stage, load_weights
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.model_runner import ModelRunner

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Request:
    """What one client asks for."""

    prompt_ids: list[int]
    max_tokens: int
    num_logprobs: int = -1


class ScheduledModel:
    """A model with its weights, for any number of runs with other pools."""

    @torch.inference_mode()
    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        quant: Quant = "none",
    ) -> None:
        self.facts, self._dtype, self._device = checkpoint.facts, dtype, device
        self.has_graphs = False
        """True if steps of the last run could be CUDA graphs."""
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        """Of the last run, by the number of a request."""
        place, links = alone()
        layers = range(self.facts.num_layers)
        self._stage: DecoderStage = build_stage(
            self.facts, place, layers, links.group, dtype, device, quant, folder=checkpoint.source.path
        )
        load_weights(self._stage, checkpoint, lambda count: None)

    @torch.inference_mode()
    def run(self, limits: Limits, requests: list[Request], loses_after: int = 0) -> tuple[list[list[int]], Scheduler]:
        """Return the answers of requests that all come at once, and the scheduler at their end.

        ``loses_after``: the worker is lost after so many steps, with those in flight, and another takes its place.
        """
        scheduler, runner = Scheduler(limits), self._runner(limits)
        answers: list[list[int]] = [[] for _ in requests]
        self.logprobs, self.has_graphs = {}, runner._graphs is not None
        for number, request in enumerate(requests):
            submit = submit_of(number, request.prompt_ids, request.max_tokens)
            scheduler.submit(replace(submit, sampling=RowSampling(num_logprobs=request.num_logprobs)))
        results: deque[StepResult] = deque()
        while scheduler.num_live:
            while (plan := scheduler.schedule()) is not None:
                if loses_after and scheduler.counters.steps == loses_after:
                    loses_after = 0
                    scheduler.forget_workers("lost")
                    scheduler.use_workers(1, PoolSize(limits.num_blocks, limits.num_pages))
                    results.clear()
                    runner.close()
                    runner = self._runner(limits)
                    continue
                sampled = runner.run(plan)
                ids, logprobs = (sampled.ids_S.tolist(), sampled.logprob_list()) if sampled else ([], None)
                results.append(StepResult(plan.epoch, plan.step, ids, logprobs, 0))
            scheduler.apply(results.popleft())
            if (outputs := scheduler.take_outputs()) is not None:
                for number, tokens, error in zip(outputs.sequence_ids, outputs.token_ids, outputs.errors, strict=True):
                    assert not error, error
                    answers[number].extend(tokens)
                for number, logprobs in zip(outputs.sequence_ids, outputs.logprobs, strict=True):
                    self.logprobs.setdefault(number, []).extend(logprobs)
        scheduler.check_integrity()
        runner.close()
        return answers, scheduler

    def _runner(self, limits: Limits) -> ModelRunner:
        """Make rows and caches in which everything that was not written is NaN."""
        place, links = alone()
        self._stage.max_positions = limits.max_seq_len + 1
        sizes = limits.num_blocks, limits.block_size, limits.max_rows + limits.num_snapshots
        types = self._dtype, self._dtype
        layers = self._stage.layer_range
        cache = KvCache.of_layers(self.facts, layers, place.part, sizes, types, self._device, limits.num_pages)
        for layer in cache.layers:
            layer.k_NBJK.fill_(torch.nan)
            layer.v_NBJK.fill_(torch.nan)
            if layer.states is not None:
                layer.states.state_NHKV.fill_(torch.nan)
                layer.states.tail_NWC.fill_(torch.nan)
        shape = limits.max_rows, limits.max_seq_len, limits.block_size, limits.num_blocks
        rows = RowTable(*shape, self._device, limits.num_pages)
        return ModelRunner(self._stage, cache, rows, links, self.facts, place, 1)
