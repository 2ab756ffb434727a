"""Execute step plans on one rank: embed or receive, run the layers, then send on or choose tokens."""

# T tokens of the step, S rows that sample, D model dim

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgpu.protocol.internal.worker_messages import NewRow, RowSampling, StepPlan, Vocabulary
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import DecoderStage
from mgpu.worker.ranks.links import Links
from mgpu.worker.ranks.peer_group import peers_of
from mgpu.worker.ranks.relay import Relay, tag_of
from mgpu.worker.sampling.sampler import Sampled, Sampler
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable, SampleRequest
from mgpu.worker.steps.graphs import make_graphs, prepared

if TYPE_CHECKING:
    from mgpu.worker.steps.graph_pool import StepOutput


@dataclass(frozen=True, slots=True)
class _PendingTokens:
    """Tokens that the last stage chooses and the first one has not received yet."""

    step: int
    request: SampleRequest
    occupant_ids: list[int]
    """`RowTable.occupant_ids` of the rows in that step."""


class ModelRunner:
    """One rank's model, cache and rows. The same plans in the same order on every rank give the same state.

    With several stages the last one chooses tokens and the first one needs them. A row that samples in step n is not
    planned before step n + S (S stages): the other stages work on the steps in between. On GPUs a `Relay` brings tokens
    back as kernels. Elsewhere the first stage receives the tokens of step n just before step n + S. Meanwhile the row
    may have been freed and given to another request, whose tokens must stay: occupant ids tell the two apart.
    """

    def __init__(
        self,
        stage: DecoderStage,
        cache: KvCache,
        rows: RowTable,
        links: Links,
        facts: ModelFacts,
        place: RankPlace,
        num_stages: int,
    ) -> None:
        self._stage = stage
        self._cache = cache
        self._rows = rows
        self._links = links
        self._hidden_size = facts.hidden_size
        self._num_stages = num_stages
        self._is_first = place.stage_index == 0
        self._is_last = place.stage_index == num_stages - 1
        self._sampler = Sampler(rows, links.group, tuple(map(len, place.part.vocabulary(facts.vocab_size))))
        self._pending: deque[_PendingTokens] = deque()
        self._relay: Relay | None = links.relay
        self._graphs = make_graphs(stage, cache, rows, links.group, links.relay)

    def check_peers(self) -> None:
        """Raise PeerLost if a computed step has waited for another rank in vain."""
        if (peers := peers_of(self._links.group)) is not None:
            peers.check()
        if self._relay is not None:
            self._relay.check()

    def close(self) -> None:
        """Let go of what must end before the links to other ranks do."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Prepare for rows with a grammar, on the ranks that choose tokens."""
        if self._is_last:
            self._sampler.grammars.use(vocabulary)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Sampled | None:
        """Execute one step. Return the chosen tokens on the last stage, None if no row samples. BadPlan, PeerLost."""
        self.check_peers()
        self._copy_states(plan)
        self._receive_tokens(plan.step - self._num_stages)
        tag = tag_of(plan.step)
        if self._is_last:
            self._sampler.grammars.follow(plan)
        if self._graphs is not None and self._graphs.take(plan):
            output = self._graphs.run(plan, tag)
            return self._sampled_by_graph(output, plan, tag) if output is not None else None
        self._rows.apply(plan)
        if not plan.rows:
            return None
        self._fetch_tokens(plan)
        batch, request = self._rows.batch(plan)
        if self._is_first and request is not None:
            self._expect_tokens(plan.step, request, tag)
        x_TD = self._stage.embed(batch.token_ids) if self._is_first else self._receive(len(batch.positions))
        x_TD = self._stage.run_layers(x_TD, batch, self._cache)
        if not self._is_last:
            self._send(x_TD)
            return None
        return self._choose(x_TD[batch.logit_rows], request, tag) if request is not None else None

    def _copy_states(self, plan: StepPlan) -> None:
        """Save the states of rows as they are before the step, then give new rows the states that they start from."""
        self._cache.copy_states(plan.save_rows, plan.save_slots)
        starting = [new for new in plan.new_rows if new.state_slot >= 0]
        self._cache.copy_states([new.state_slot for new in starting], [new.row for new in starting])

    def _sampled_by_graph(self, output: "StepOutput", plan: StepPlan, tag: int) -> Sampled | None:
        """Return the tokens that a graph chose, or choose all of them again if that was not enough for some row.

        A graph takes the arg-max, with or without noise. Rows with top_p, top_k, min_p, penalties, biased or banned
        tokens, a grammar or log-probabilities need more. If one row of the step does, the sampler chooses for all of
        its rows from the graph's logits. The graph's tokens are discarded, also in the rows: the new ones are written
        over them, on the same stream, before the next step reads them. Simple rows get the same token again.
        """
        rows = self._rows
        sampling = [i for i, samples in enumerate(plan.samples) if samples]
        if not sampling:
            return None
        numbers = [plan.rows[i] for i in sampling]
        if all(rows.is_simple[row] for row in numbers):
            ids_R = output.ids_R  # copied below, because the next step overwrites it
            all_sample = len(sampling) == len(plan.rows)
            return Sampled(ids_R[: len(sampling)].clone() if all_sample else ids_R[rows.to_device([sampling])[0]], None)
        positions = [plan.starts[i] + plan.counts[i] for i in sampling]
        sampling_S, rows_S, positions_S = rows.to_device([sampling, numbers, positions])
        request = rows.request(numbers, positions, rows_S, positions_S)
        return self._chosen(self._sampler.sample(output.logits_RV[sampling_S].float(), request), request, tag)

    def _choose(self, x_SD: Tensor, request: SampleRequest, tag: int) -> Sampled:
        return self._chosen(self._sampler.sample(self._stage.logits(x_SD), request), request, tag)

    def _chosen(self, sampled: Sampled, request: SampleRequest, tag: int) -> Sampled:
        """Write chosen tokens to where the next step of their rows reads them, on this stage and on the first."""
        self._rows.write_sampled(request, sampled.ids_S)
        if self._relay is None:
            self._links.send_tokens(sampled.ids_S)
        elif self._relay.post is not None:
            (tag_1,) = self._rows.to_device([[tag]])
            self._relay.post(sampled.ids_S.contiguous(), request.rows_S, request.positions_S, tag_1)
        return sampled

    # -- other stages --------------------------------------------------------------------------------------------------

    def _receive(self, num_tokens: int) -> Tensor:
        """Wait for the activations of the stage before, [T, D]."""
        if self._relay is not None and self._relay.receive is not None and self._relay.takes(num_tokens):
            return self._relay.receive(num_tokens)
        return self._links.recv(num_tokens, self._hidden_size, self._stage.dtype)

    def _send(self, x_TD: Tensor) -> None:
        """Send activations to the next stage."""
        if self._relay is not None and self._relay.send is not None and self._relay.takes(len(x_TD)):
            self._relay.send(x_TD)
        else:
            self._links.send(x_TD)

    def _fetch_tokens(self, plan: StepPlan) -> None:
        """With a relay, on the first stage: wait on the device for tokens that this step computes."""
        if self._relay is not None and self._relay.mailbox is not None:
            rows_R, starts_R = self._rows.to_device([plan.rows, plan.starts])
            self._relay.mailbox.fetch(self._rows.tokens, rows_R, starts_R)

    def _expect_tokens(self, step: int, request: SampleRequest, tag: int) -> None:
        """On the first of several stages: remember that the last one will choose tokens for these rows."""
        if self._relay is not None and self._relay.mailbox is not None:
            (tag_1,) = self._rows.to_device([[tag]])
            self._relay.mailbox.expect(self._rows.tokens, request.rows_S, request.positions_S, tag_1)
        elif not self._is_last:
            occupant_ids = [self._rows.occupant_ids[row] for row in request.rows]
            self._pending.append(_PendingTokens(step, request, occupant_ids))

    def _receive_tokens(self, last_step: int) -> None:
        """Receive and write the tokens of all steps up to ``last_step``, except those of rows freed since."""
        rows = self._rows
        while self._pending and self._pending[0].step <= last_step:
            pending = self._pending.popleft()
            request, ids_S = pending.request, self._links.recv_tokens(len(pending.request.rows))
            kept = [i for i, row in enumerate(request.rows) if rows.occupant_ids[row] == pending.occupant_ids[i]]
            if len(kept) < len(request.rows):
                (kept_N,) = rows.to_device([kept])
                request, ids_S = request.pick(kept, kept_N), ids_S[kept_N]
            rows.write_sampled(request, ids_S)

    def warm_up(self, num_tokens: int, epoch: int) -> None:
        """Run prefills and decode steps on row 0, together with all ranks; then free it and make the first graphs."""
        block_size = self._rows.block_size
        blocks = list(range(-(-(num_tokens + 2) // block_size)))
        graphs, self._graphs = self._graphs, None  # without graphs first: steps that no graph serves must be warm too
        samplings = (RowSampling(temperature=1.0), RowSampling(temperature=1.0, top_p=0.9))
        step = -3 * len(samplings) * self._num_stages  # negative numbers, as far apart as steps of one row must be
        for sampling in samplings:
            row = NewRow(0, bytes(4 * num_tokens), num_tokens, blocks, sampling)
            for index in range(3):
                start, count = (0, num_tokens) if index == 0 else (num_tokens + index - 1, 1)
                self.run(StepPlan(epoch, step, [], [] if index else [row], [], [], [0], [start], [count], [1]))
                step += self._num_stages
        self.run(StepPlan(epoch, 0, [0], [], [], [], [], [], [], []))
        self._graphs = graphs if graphs is None else prepared(graphs)
        self.check_peers()
