"""Rows that follow grammars, sampled by the worker's own code from random logits."""

import struct

import torch
from torch import Tensor

from harness.ranks.rank_threads import ThreadGroup, run_ranks
from mgpu.protocol.internal.grammars import new_matcher, token_table
from mgpu.protocol.internal.worker_messages import NewRow, RowGrammar, RowSampling, StepPlan, Vocabulary
from mgpu.worker.sampling.grammar_state import GrammarState
from mgpu.worker.sampling.sampler import Sampler
from mgpu.worker.state.rows import RowTable

TOKENS = [bytes([each]) for each in range(256)] + [b"ab", b"</s>", b"[]"]
EOS = 257
PADDED = 288
"""Logits that the ranks have together: more than tokens, and no multiple of 64 on three ranks."""
VOCABULARY = Vocabulary(0, TOKENS, [EOS])
CPU = torch.device("cpu")


def logits_of(step: int, rows: int) -> Tensor:
    return torch.randn(rows, PADDED, generator=torch.Generator().manual_seed(step))


def answers(
    sampling: list[RowSampling], steps: int, emitted: tuple[list[int], ...] = (), ranks: int = 1
) -> tuple[list[list[int]], list[tuple[int, str]]]:
    """Sample rows whose prompts have two tokens; return their tokens and the failures of the last step."""
    before = list(emitted) or [[] for _ in sampling]

    def work(group: ThreadGroup) -> tuple[list[list[int]], list[tuple[int, str]]]:
        rows, width = RowTable(8, 64, 16, 8, CPU), PADDED // ranks
        sampler = Sampler(rows, group, width)
        sampler.grammars.use(VOCABULARY)
        plan = plan_of(sampling, before)
        sampler.grammars.follow(plan)
        rows.apply(plan)
        tokens = [list(each) for each in before]
        failures: list[tuple[int, str]] = []
        numbers = list(range(len(sampling)))
        for step in range(len(tokens[0]), steps):
            positions = [2 + len(each) for each in tokens]
            request = rows.request(numbers, positions, torch.tensor(numbers), torch.tensor(positions))
            part = logits_of(step, len(sampling))[:, group.rank * width : (group.rank + 1) * width].clone()
            sampled = sampler.sample(part, request)
            rows.write_sampled(request, sampled.ids_S)
            failures = sampled.failures
            for each, token in zip(tokens, sampled.ids_S.tolist(), strict=True):
                each.append(token)
        return tokens, failures

    results = run_ranks(ranks, work)
    assert all(each == results[0] for each in results)
    return results[0]


def of(grammar: str, stop_ids: tuple[int, ...] = (EOS,), **options: object) -> RowSampling:
    return RowSampling(
        grammar=RowGrammar(f'%llguidance {{"no_forcing": true}}\nstart: {grammar}', [*stop_ids]), **options
    )  # type: ignore[arg-type]


def plan_of(sampling: list[RowSampling], emitted: list[list[int]]) -> StepPlan:
    """Return a plan that begins rows whose prompts have two tokens."""
    new = [
        NewRow(row, struct.pack(f"<{2 + len(tokens)}i", 1, 2, *tokens), 2, [0, 1, 2], each)
        for row, (each, tokens) in enumerate(zip(sampling, emitted, strict=True))
    ]
    return StepPlan(1, 1, [], new, [], [], [], [], [], [])


def states_of(*grammars: str) -> list[GrammarState]:
    tokens = token_table(VOCABULARY)
    texts = [of(each).grammar.text for each in grammars]  # type: ignore[union-attr]
    return [GrammarState(new_matcher(tokens, text), [EOS], len(TOKENS)) for text in texts]


def allowed(words_W: Tensor) -> set[int]:
    return {bit for bit in range(len(words_W) * 32) if int(words_W[bit // 32]) >> bit % 32 & 1}
