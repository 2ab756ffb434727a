"""Choose the next token of every row that samples, the same one on every rank of the stage.

Each rank has the logits of its slice of the vocabulary. Most rows need only the best of each slice: greedy rows, and
rows with a temperature and no filter, exchange one (value, id) pair per rank. Rows with top_k, top_p, min_p or
log-probabilities gather all logits.
"""

# S rows that sample, V tokens (of this rank's slice, or all where a comment says so), F rows that need all logits

import logging
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.internal.worker_messages import TokenLogprobs
from mgpu.worker.kernels.use import aligned, uses_kernels
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.sampling.filters import thresholds
from mgpu.worker.sampling.grammars import Grammars
from mgpu.worker.sampling.noise import add_gumbel, row_keys, token_factors
from mgpu.worker.sampling.rules import apply_rules
from mgpu.worker.state.rows import RowTable, SampleRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of the rows ``indices``, still on the device; ``wanted`` are their counts of top tokens."""

    indices: list[int]
    wanted: list[int]
    chosen_F: Tensor
    top_ids_FN: Tensor
    top_FN: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one step in plan order, int32 [S] on the device."""

    ids_S: Tensor
    logprobs: LogprobTensors | None
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Rows that cannot go on, by their grammar or their rules: their index, and why."""

    def logprob_list(self) -> list[TokenLogprobs | None] | None:
        """Read the log-probabilities back, parallel to the tokens; None if no row asked for them."""
        if self.logprobs is None:
            return None
        asked = self.logprobs
        rows: list[TokenLogprobs | None] = [None] * len(self.ids_S)
        chosen, top_ids, top = asked.chosen_F.tolist(), asked.top_ids_FN.tolist(), asked.top_FN.tolist()
        for i, (index, count) in enumerate(zip(asked.indices, asked.wanted, strict=True)):
            rows[index] = TokenLogprobs(chosen[i], top_ids[i][:count], top[i][:count])
        return rows


class Sampler:
    """Sampler of one rank of the last stage. ``slices`` are the logits of each rank, or one number for all of them."""

    def __init__(self, rows: RowTable, group: TensorParallelGroup, slices: int | tuple[int, ...]) -> None:
        self._rows = rows
        self._group = group
        self._uses_kernel = uses_kernels(rows.device)
        self._slices = (slices,) * group.size if isinstance(slices, int) else slices
        self._first_id, total = sum(self._slices[: group.rank]), sum(self._slices)
        self._slice = token_factors(self._first_id, self._slices[group.rank], rows.device)
        self.grammars = Grammars(rows.max_rows, total, rows.device, reports=group.rank == 0)
        self._broken_rules: dict[int, str] = {}
        """Rows of the step whose rules could not be applied, and why."""
        self._all = self._slice if group.size == 1 else token_factors(0, total, rows.device)

    def sample(self, logits_SV: Tensor, request: SampleRequest) -> Sampled:
        """Choose from this rank's fp32 logits [S, V], which may be overwritten."""
        failures = self.grammars.wait(request)
        self._broken_rules.clear()
        sampled = self._choose(logits_SV, request)
        self.grammars.take(request, sampled.ids_S)
        failures += [(request.rows.index(number), why) for number, why in self._broken_rules.items()]
        return replace(sampled, failures=failures) if failures else sampled

    def _choose(self, logits_SV: Tensor, request: SampleRequest) -> Sampled:
        whole = [i for i, row in enumerate(request.sampling) if row.needs_all_logits]
        if not whole:
            return Sampled(self._choose_by_slices(logits_SV, request), None)
        if len(whole) == len(request.sampling):
            return self._choose_from_all(logits_SV, request)
        return self._choose_mixed(logits_SV, request, whole)

    def _choose_mixed(self, logits_SV: Tensor, request: SampleRequest, whole: list[int]) -> Sampled:
        """Choose from all logits for the rows ``whole``, by slices for the others."""
        split = sorted(set(range(len(request.rows))) - set(whole))
        whole_F, split_S = self._rows.to_device([whole, split])
        from_all = self._choose_from_all(logits_SV[whole_F], request.pick(whole, whole_F))
        ids_S = torch.empty(len(request.rows), dtype=torch.int32, device=logits_SV.device)
        ids_S[whole_F] = from_all.ids_S
        ids_S[split_S] = self._choose_by_slices(logits_SV[split_S], request.pick(split, split_S))
        logprobs = from_all.logprobs
        if logprobs is not None:
            logprobs = replace(logprobs, indices=[whole[i] for i in logprobs.indices])
        return Sampled(ids_S, logprobs)

    def _choose_by_slices(self, logits_SV: Tensor, request: SampleRequest) -> Tensor:
        """Choose in each rank's slice alone, then take the best of the ranks. Of equal values, the lowest id wins."""
        self._apply_rules(logits_SV, self._first_id, request)
        best_S, ids_S = self._best(logits_SV, request)
        if self._group.size == 1:
            return ids_S
        # One message: the value's bits beside the id.
        pair_S2 = torch.stack([best_S.view(torch.int32), ids_S], dim=-1)
        pairs_SR2 = self._group.all_gather(pair_S2).view(len(pair_S2), self._group.size, 2)
        winner_S = pairs_SR2[:, :, 0].contiguous().view(torch.float32).argmax(-1)
        return pairs_SR2[:, :, 1].gather(-1, winner_S[:, None])[:, 0]

    def _best(self, logits_SV: Tensor, request: SampleRequest) -> tuple[Tensor, Tensor]:
        """Return the largest of this rank's logits with noise, float32 [S], and its token, int32 [S]."""
        if self._uses_kernel:
            from mgpu.worker.kernels.sample import sample

            return sample(
                logits_SV,
                first_id=self._first_id,
                rows_S=aligned(request.rows_S),
                positions_S=aligned(request.positions_S),
                temperatures=self._rows.temperatures,
                seeds=self._rows.seeds,
            )
        z_SV = self._with_noise(logits_SV, self._slice, request, filtered=False)
        local_S = z_SV.argmax(-1)
        best_S = z_SV.gather(-1, local_S[:, None])[:, 0]
        return best_S, (local_S + self._first_id).to(torch.int32)

    def _choose_from_all(self, logits_FV: Tensor, request: SampleRequest) -> Sampled:
        """Gather the logits of all ranks, and choose on every rank alike."""
        raw_FV = gathered(logits_FV, self._group, self._slices)
        asked = [i for i, row in enumerate(request.sampling) if row.num_logprobs >= 0]
        z_FV = raw_FV.clone() if asked else raw_FV
        self._apply_rules(z_FV, 0, request)
        z_FV = self._with_noise(z_FV, self._all, request, filtered=True)
        ids_F = z_FV.argmax(-1)
        return Sampled(ids_F.to(torch.int32), self._logprobs(raw_FV, ids_F, asked, request) if asked else None)

    def _apply_rules(self, logits_SV: Tensor, first_id: int, request: SampleRequest) -> None:
        for i, row in enumerate(request.sampling):
            if row.has_rules:
                number = request.rows[i]
                tokens_L = self._rows.tokens[number, : request.positions[i]]
                try:
                    apply_rules(logits_SV[i], first_id, row, tokens_L, self._rows.prompt_lens[number])
                except Exception as error:  # what one client asks for must not end the rows of others
                    log.exception("the sampling rules of a row failed, and only that row ends")
                    self._broken_rules[number] = f"internal error in its sampling rules ({type(error).__name__})"
        self.grammars.apply(logits_SV, first_id, request)

    def _with_noise(self, logits_SV: Tensor, factors_V: Tensor, request: SampleRequest, filtered: bool) -> Tensor:
        """Scale, filter and add noise to rows with a temperature; greedy rows stay as they are."""
        drawn = [i for i, row in enumerate(request.sampling) if not row.is_greedy]
        if not drawn:
            return logits_SV
        if len(drawn) == len(request.sampling):
            return self._draw(logits_SV, factors_V, request, filtered)
        (drawn_N,) = self._rows.to_device([drawn])
        logits_SV[drawn_N] = self._draw(logits_SV[drawn_N], factors_V, request.pick(drawn, drawn_N), filtered)
        return logits_SV

    def _draw(self, logits_SV: Tensor, factors_V: Tensor, request: SampleRequest, filtered: bool) -> Tensor:
        z_SV = logits_SV / self._rows.temperatures[request.rows_S][:, None]
        if filtered and any(row.has_filters for row in request.sampling):
            z_SV.masked_fill_(z_SV < thresholds(z_SV, request.sampling)[:, None], -torch.inf)
        keys_S = row_keys(self._rows.seeds[request.rows_S], request.positions_S)
        return add_gumbel(z_SV, keys_S, factors_V)

    def _logprobs(self, raw_FV: Tensor, ids_F: Tensor, asked: list[int], request: SampleRequest) -> LogprobTensors:
        (asked_N,) = self._rows.to_device([asked])
        raw_NV, ids_N = raw_FV[asked_N], ids_F[asked_N]
        total_N1 = raw_NV.logsumexp(-1, keepdim=True)
        wanted = [min(request.sampling[i].num_logprobs, raw_NV.shape[1]) for i in asked]
        top = torch.topk(raw_NV, max(wanted))
        chosen_N = (raw_NV.gather(-1, ids_N[:, None]) - total_N1)[:, 0]
        return LogprobTensors(asked, wanted, chosen_N, top.indices, top.values - total_N1)


def gathered(logits_FV: Tensor, group: TensorParallelGroup, slices: tuple[int, ...]) -> Tensor:
    """Return the logits of all ranks, of which each has one of the slices. Unequal ones are padded on the way."""
    longest = max(slices)
    if longest == min(slices):
        return group.all_gather(logits_FV)
    padded_FV = group.all_gather(F.pad(logits_FV, (0, longest - logits_FV.shape[1])))
    firsts = range(0, longest * len(slices), longest)
    return torch.cat([padded_FV[:, at : at + size] for at, size in zip(firsts, slices, strict=True)], dim=1)
