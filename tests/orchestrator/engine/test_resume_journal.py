"""What the journal remembers of requests that can be resumed, for how long, and in which portions it tells it."""

from array import array

import pytest

from mgpu.orchestrator.engine.resume_journal import KEEP_S, Journal
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.gateway_messages import Outputs, Resumable, SequenceRecord, Submit
from mgpu.protocol.internal.packed_logprobs import LogprobPacking
from mgpu.protocol.internal.worker_messages import RowSampling, TokenLogprobs

SESSION = "0123456789abcdef"
TOP = 2


def resumable(request_id: int, num_logprobs: int = -1, n: int = 1) -> Resumable:
    """Return a request whose first sequence has its number."""
    sampling = RowSampling(num_logprobs=num_logprobs)
    submits = [Submit(request_id + at, array("i", [1]).tobytes(), 5, [], sampling, b"", 0) for at in range(n)]
    return Resumable(SESSION, request_id, b"context", submits)


def journal_with(count: int, clock: list[float]) -> Journal:
    journal = Journal(clock_s=lambda: clock[0])
    for number in range(count):
        assert journal.open(resumable(number))
        journal.attach(number, None)
        journal.note(Outputs([number], [[]], [[]], ["error"], ["refused"], [0]))
    return journal


def test_the_journal_keeps_the_ended_for_a_minute() -> None:
    clock = [0.0]
    journal = journal_with(10, clock)
    assert journal.look_up(SESSION, 3)[1][0].error == "refused"
    clock[0] = KEEP_S - 1
    journal.prune()
    assert len(journal) == 10
    clock[0] = KEEP_S + 1
    journal.prune()
    assert len(journal) == 0
    assert journal.look_up(SESSION, 3) == (b"", [])


def test_the_journal_keeps_only_so_many_of_the_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgpu.orchestrator.engine.resume_journal.KEEP_REQUESTS", 5)
    journal = journal_with(10, [0.0])
    assert len(journal) == 5
    assert journal.look_up(SESSION, 4) == (b"", [])
    assert journal.look_up(SESSION, 5)[1]


def logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(token), [token, 0], [-0.5, -1.5])


def say(journal: Journal, seqs: list[Sequence], tokens: list[int], finish: str = "") -> None:
    """Let each sequence have the same new tokens, as a step of the engine does."""
    for seq in seqs:
        seq.tokens.extend(tokens)
    count = len(seqs)
    values = [[logprobs(token) for token in tokens]] * count
    ids = [seq.sequence_id for seq in seqs]
    journal.note(Outputs(ids, [tokens] * count, values, [finish] * count, [""] * count, [0] * count))


def running(journal: Journal, message: Resumable) -> list[Sequence]:
    assert journal.open(message)
    seqs = [Sequence.from_submit(submit, 0, 100) for submit in message.submits]
    for seq in seqs:
        journal.attach(seq.sequence_id, seq)
    return seqs


def told(record: SequenceRecord) -> tuple[list[int], list[TokenLogprobs]]:
    ids = array("i", record.token_ids).tolist()
    return ids, LogprobPacking(TOP).unpack(record.logprobs)


@pytest.mark.parametrize("finish", ["", "length"])
def test_a_record_is_told_in_portions_with_log_probabilities_from_the_offsets_on(
    monkeypatch: pytest.MonkeyPatch, finish: str
) -> None:
    monkeypatch.setattr("mgpu.orchestrator.engine.resume_journal.PORTION_TOKENS", 4)
    monkeypatch.setattr("mgpu.orchestrator.engine.resume_journal.PORTION_LOGPROB_BYTES", 3 * LogprobPacking(TOP).width)
    journal = Journal()
    seqs = running(journal, resumable(1, TOP, n=3))
    tokens = [11, 12, 13, 14, 15, 16, 17]
    for token in tokens[:-1]:
        say(journal, seqs, [token])
    say(journal, seqs, tokens[-1:], finish)
    offsets, known = [0, 3, -1], [0, 0, 0]
    ids: list[list[int]] = [[] for _ in seqs]
    values: list[list[TokenLogprobs]] = [[] for _ in seqs]
    turns = 0
    while known != [7, 7, 7]:
        turns += 1
        _, records = journal.look_up(SESSION, 1, known, offsets)
        assert sum(len(each.token_ids) for each in records) // 4 <= 4
        assert sum(len(told(each)[1]) for each in records) <= 3
        for at, each in enumerate(records):
            assert (each.num_tokens, each.finish) == (7, finish)
            more_ids, more_values = told(each)
            ids[at] += more_ids
            values[at] += more_values
            known[at] += len(each.token_ids) // 4
    assert turns <= 8
    assert ids == [tokens] * 3
    assert values == [[logprobs(token) for token in tokens[at:]] for at in (0, 3, 7)]


def test_counts_that_are_nonsense_are_looked_up_all_the_same() -> None:
    journal = Journal()
    seqs = running(journal, resumable(1, TOP, n=2))
    say(journal, seqs, [5, 6])
    for known, offsets in (([], [9]), ([], [9, 9, 9]), ([-1], [1 << 62]), ([1 << 62, 0], [])):
        _, records = journal.look_up(SESSION, 1, known, offsets)
        assert [each.num_tokens for each in records] == [2, 2]


def test_the_bytes_that_the_journal_keeps_are_bounded_log_probabilities_included(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mgpu.orchestrator.engine.resume_journal.KEEP_BYTES", 20_000)
    journal = Journal()
    for number in range(100):
        seqs = running(journal, resumable(number, 20 if number % 2 else -1))
        say(journal, seqs, list(range(10)), "length")
        kept = sum(
            len(each.token_ids) + len(each.logprobs)
            for other in range(number + 1)
            for each in journal.look_up(SESSION, other)[1]
        )
        assert kept <= 20_000
    assert 10 < len(journal) < 40
    assert journal._kept_bytes == sum(request.num_bytes for request in journal._requests.values())
