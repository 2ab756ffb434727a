"""The sampler chooses by the rules it promises, the same on any number of ranks and in any company."""

import math
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.ranks.rank_threads import ThreadGroup, run_ranks
from mgpu.protocol.internal.worker_messages import LogitBias, NewRow, RowSampling, StepPlan
from mgpu.worker.ranks.collectives import SingleRank
from mgpu.worker.sampling import sampler
from mgpu.worker.sampling.noise import gumbel, row_keys, token_factors
from mgpu.worker.sampling.rules import apply_rules
from mgpu.worker.sampling.sampler import Sampled, Sampler
from mgpu.worker.state.rows import RowTable, SampleRequest

VOCAB = 60  # splits over 1, 2 and 3 ranks
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread for torch: the tensors are small, and ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table_of(sampling: list[RowSampling], tokens: list[int], prompt_len: int) -> RowTable:
    """Return rows that all have the same tokens."""
    rows = RowTable(max(8, len(sampling)), 64, 16, 8, CPU)
    ids = struct.pack(f"<{len(tokens)}i", *tokens)
    new = [NewRow(row, ids, prompt_len, [0, 1, 2], each) for row, each in enumerate(sampling)]
    rows.apply(StepPlan(1, 1, [], new, [], [], [], [], [], []))
    return rows


def request_of(rows: RowTable, count: int, positions: list[int]) -> SampleRequest:
    numbers = [*range(count)]
    return rows.request(numbers, positions, torch.tensor(numbers), torch.tensor(positions))


def choose(
    logits_SV: Tensor,
    sampling: list[RowSampling],
    positions: list[int] | None = None,
    tokens: tuple[int, ...] = (1, 2, 3, 2),
    prompt_len: int = 2,
    ranks: int = 1,
) -> Sampled:
    """Sample one token per row on ``ranks`` ranks, which must agree."""
    rows = table_of(sampling, list(tokens), prompt_len)
    request = request_of(rows, len(sampling), positions or [len(tokens)] * len(sampling))

    def work(group: ThreadGroup) -> Sampled:
        width = logits_SV.shape[1] // ranks
        part = logits_SV[:, group.rank * width : (group.rank + 1) * width].clone()
        return Sampler(rows, group, width).sample(part, request)

    results = run_ranks(ranks, work)
    assert all(torch.equal(each.ids_S, results[0].ids_S) for each in results)
    assert all(each.logprob_list() == results[0].logprob_list() for each in results)
    return results[0]


def ids_of(logits_SV: Tensor, sampling: list[RowSampling], **options: object) -> list[int]:
    ids: list[int] = choose(logits_SV, sampling, **options).ids_S.tolist()
    return ids


def reference_bits(seed: int, position: int, token: int) -> int:
    """The hash of noise.py's docstring, in Python integers."""
    mask = 0xFFFFFFFF

    def mix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B & mask
        h ^= h >> 13
        h = h * 0xC2B2AE35 & mask
        return h ^ h >> 16

    key = mix(mix(mix((seed & mask) + 0x9E3779B9 & mask) ^ seed >> 32) ^ position)
    return mix(key ^ (token * 0x9E3779B1 & mask))


def noise_of(seed: int, position: int, tokens: range) -> Tensor:
    seeds = torch.tensor([struct.unpack("<2i", struct.pack("<Q", seed))], dtype=torch.int32)
    keys = row_keys(seeds, torch.tensor([position]))
    return gumbel(keys, token_factors(tokens.start, len(tokens), CPU))[0]


@pytest.mark.parametrize("seed", [0, 1, 0xFFFFFFFF, 0x123456789ABCDEF0, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 5, 131071])
def test_noise_is_the_documented_formula(seed: int, position: int) -> None:
    tokens = range(100, 140)
    expected = []
    for token in tokens:
        v = min(((reference_bits(seed, position, token) >> 1) + 0.5) / 2**31, 1 - 2**-24)
        expected.append(-math.log(-math.log1p(-v)))
    torch.testing.assert_close(noise_of(seed, position, tokens), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_noise_never_changes_between_versions() -> None:
    assert [reference_bits(42, 7, token) for token in (0, 1, 151935)] == BITS_42_7
    torch.testing.assert_close(noise_of(42, 7, range(3)), torch.tensor(NOISE_42_7), rtol=1e-5, atol=1e-5)


BITS_42_7 = [3429720013, 1751848943, 1221475582]
NOISE_42_7 = [-0.47136766, 0.64616263, 0.60176551]


def test_noise_is_finite_for_every_extreme_hash() -> None:
    noise = torch.cat([noise_of(seed, 3, range(200_000)) for seed in range(5)])
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_greedy_takes_the_lowest_id_of_equal_logits(ranks: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [19, 20, 21, 40, 59]] = 5.0
    assert ids_of(logits, [RowSampling()], ranks=ranks) == [19]


RULED = [
    RowSampling(),
    RowSampling(temperature=0.8, seed=11),
    RowSampling(temperature=1.5, seed=2**63 + 5, top_k=7),
    RowSampling(temperature=1.0, seed=3, top_p=0.7, num_logprobs=3),
    RowSampling(temperature=1.0, seed=3, min_p=0.2, repetition_penalty=1.4),
    RowSampling(num_logprobs=2, presence_penalty=0.5, frequency_penalty=0.3),
    RowSampling(logit_bias=LogitBias.of([(4, 9.0), (45, 9.5)])),
    RowSampling(temperature=0.5, seed=9, banned_until=99, banned_ids=[0, 30, 59]),
]


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_rules_give_the_same_tokens_on_any_number_of_ranks(ranks: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for position in range(4, 24):
        logits = torch.randn(len(RULED), VOCAB, generator=generator) * 2
        positions = [position] * len(RULED)
        tokens = tuple(range(position))
        alone = choose(logits, RULED, positions, tokens)
        split = choose(logits, RULED, positions, tokens, ranks=ranks)
        assert torch.equal(alone.ids_S, split.ids_S)
        assert alone.logprob_list() == split.logprob_list()


def test_a_row_does_not_depend_on_its_company() -> None:
    logits = torch.randn(len(RULED), VOCAB, generator=torch.Generator().manual_seed(6)) * 2
    together = ids_of(logits, RULED)
    for index, sampling in enumerate(RULED):
        assert ids_of(logits[index : index + 1], [sampling]) == [together[index]]
    assert ids_of(logits.flip(0), RULED[::-1]) == together[::-1]


def test_seed_and_position_change_the_draw() -> None:
    logits = torch.zeros(1, VOCAB).expand(40, VOCAB)
    by_seed = ids_of(logits, [RowSampling(temperature=1.0, seed=seed) for seed in range(40)])
    by_position = ids_of(logits, [RowSampling(temperature=1.0, seed=1)] * 40, positions=[*range(4, 44)])
    assert len(set(by_seed)) > 15
    assert len(set(by_position)) > 15


def chi_square(ids: list[int], probabilities: Tensor) -> float:
    """Return the statistic divided by its degrees of freedom: near 1 if the counts fit."""
    counts = torch.bincount(torch.tensor(ids), minlength=len(probabilities)).double()
    expected = probabilities.double() * len(ids)
    assert (counts[expected == 0] == 0).all(), "a token of probability zero was drawn"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    return float(statistic / max(1, int(used.sum()) - 1))


def draw_many(logits_V: Tensor, sampling: RowSampling, count: int) -> list[int]:
    """Draw with many seeds, and at many positions of each."""
    ids: list[int] = []
    for seed in range(count // 1000):
        rows = [replace(sampling, seed=seed)] * 1000
        table = table_of(rows, [1, 2], 1)
        request = request_of(table, 1000, [*range(7, 1007)])
        logits_SV = logits_V.expand(1000, -1).clone()
        ids += Sampler(table, SingleRank(), len(logits_V)).sample(logits_SV, request).ids_S.tolist()
    return ids


LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -2.0, 0.5, 0.5, -6.0, 1.0])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_temperature_draws_from_the_softmax(temperature: float) -> None:
    ids = draw_many(LOGITS_V, RowSampling(temperature=temperature), 40_000)
    assert chi_square(ids, (LOGITS_V / temperature).softmax(-1)) < 2.8


def test_unlikely_tokens_keep_their_probability() -> None:
    logits = torch.full((5_000,), -9.0)
    logits[0] = 1.0
    ids = draw_many(logits, RowSampling(temperature=1.0), 2_000)
    share = float(logits.softmax(-1)[1:].sum())
    assert abs(sum(id_ != 0 for id_ in ids) / len(ids) - share) < 4 * math.sqrt(share * (1 - share) / len(ids))


def kept(probabilities: Tensor, keep: list[int]) -> Tensor:
    mask = torch.zeros_like(probabilities).index_fill(0, torch.tensor(keep), 1.0)
    return probabilities * mask / (probabilities * mask).sum()


@pytest.mark.parametrize(
    ("sampling", "keep"),
    [
        (RowSampling(temperature=1.0, top_k=3), [0, 4, 1, 9]),  # tokens 1 and 9 are equally likely
        (RowSampling(temperature=1.0, top_p=0.6), [0, 4, 1, 9]),
        (RowSampling(temperature=1.0, top_p=0.0), [0]),
        (RowSampling(temperature=1.0, top_k=1), [0]),
        (RowSampling(temperature=1.0, min_p=0.3), [0, 4, 1, 9]),
        (RowSampling(temperature=1.0, top_k=5, top_p=0.5), [0, 4]),
        (RowSampling(temperature=1.0, top_k=999, top_p=1.0), [*range(10)]),
    ],
    ids=lambda value: "" if isinstance(value, list) else f"k{value.top_k}-p{value.top_p}-m{value.min_p}",
)
def test_filters_draw_from_what_they_keep(sampling: RowSampling, keep: list[int]) -> None:
    ids = draw_many(LOGITS_V, sampling, 20_000)
    assert chi_square(ids, kept(LOGITS_V.softmax(-1), keep)) < 3.2


def test_a_flat_nucleus_of_thousands_of_tokens_is_exact() -> None:
    logits = torch.linspace(0, 0.5, 6_000)
    ids = draw_many(logits, RowSampling(temperature=1.0, top_p=0.5), 1_000)
    order = logits.softmax(-1).double().flip(0)
    cut = 6_000 - 1 - int((order.cumsum(-1) < 0.5).sum())
    assert min(ids) >= cut
    assert min(ids) < cut + 60


@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.99, 1.0])
def test_a_top_k_of_the_whole_vocabulary_changes_nothing(top_p: float) -> None:
    logits = torch.randn(100, VOCAB, generator=torch.Generator().manual_seed(3))
    without, beyond = (
        [RowSampling(temperature=1.0, top_p=top_p, top_k=top_k, seed=seed) for seed in range(100)]
        for top_k in (0, 2**31 - 1)
    )
    assert ids_of(logits, without) == ids_of(logits, beyond)


def test_top_k_one_is_greedy_at_any_temperature_and_seed() -> None:
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(1))
    sampling = [RowSampling(temperature=100.0, top_k=1, seed=seed) for seed in range(200)]
    assert ids_of(logits, sampling) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-4])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(2)) * 30
    assert ids_of(logits, [RowSampling(temperature=temperature, seed=4)] * 50) == logits.argmax(-1).tolist()


def test_logit_bias_is_added() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 10] = 5.0
    assert ids_of(logits, [RowSampling(logit_bias=LogitBias.of([(50, 4.9)]))], ranks=2) == [10]
    assert ids_of(logits, [RowSampling(logit_bias=LogitBias.of([(50, 5.1)]))], ranks=2) == [50]
    assert ids_of(logits, [RowSampling(logit_bias=LogitBias.of([(10, -math.inf), (3, 1.0)]))], ranks=2) == [3]
    assert ids_of(logits, [RowSampling(logit_bias=LogitBias.of([(50, 2.5), (3, 4.9), (50, 2.6)]))], ranks=2) == [50]


def test_repetition_penalty_counts_the_prompt_and_shrinks_either_sign() -> None:
    penalty = RowSampling(repetition_penalty=2.0)
    positive = torch.zeros(1, VOCAB)
    positive[0, [1, 9]] = torch.tensor([4.0, 2.5])  # 1 is in the prompt
    assert ids_of(positive, [penalty]) == [9]
    negative = torch.full((1, VOCAB), -9.0)
    negative[0, [1, 9]] = torch.tensor([-1.0, -1.5])
    assert ids_of(negative, [penalty]) == [9]


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [1, 2, 3]] = torch.tensor([4.0, 5.0, 4.5])
    tokens = (1, 1, 1, 2, 2)  # the first three are prompt
    options: dict[str, object] = {"tokens": tokens, "prompt_len": 3}
    assert ids_of(logits, [RowSampling()], **options) == [2]
    assert ids_of(logits, [RowSampling(presence_penalty=0.4)], **options) == [2]
    assert ids_of(logits, [RowSampling(presence_penalty=0.6)], **options) == [3]
    assert ids_of(logits, [RowSampling(frequency_penalty=0.2)], **options) == [2]
    assert ids_of(logits, [RowSampling(frequency_penalty=0.3)], **options) == [3]
    logits[0, 3] = 0.0
    assert ids_of(logits, [RowSampling(frequency_penalty=0.6)], **options) == [1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_banned_ids_return_at_their_position(ranks: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8]] = torch.tensor([2.0, 1.0])
    sampling = [RowSampling(banned_until=6, banned_ids=[7, 55])]
    assert ids_of(logits, sampling, positions=[5], tokens=(1,) * 5, ranks=ranks) == [8]
    assert ids_of(logits, sampling, positions=[6], tokens=(1,) * 6, ranks=ranks) == [7]


@pytest.mark.parametrize("ranks", [1, 2])
def test_logprobs_are_of_the_raw_distribution(ranks: int) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    sampling = [
        RowSampling(temperature=0.5, seed=1, num_logprobs=4, logit_bias=LogitBias.of([(20, 50.0)])),
        RowSampling(),
        RowSampling(num_logprobs=0),
    ]
    sampled = choose(logits, sampling, ranks=ranks)
    found = sampled.logprob_list()
    assert found is not None
    expected = logits.log_softmax(-1)
    biased, none, greedy = found
    assert none is None
    assert biased is not None
    assert sampled.ids_S[0] == 20
    assert biased.chosen == pytest.approx(float(expected[0, 20]), abs=1e-5)
    top = expected[0].topk(4)
    assert biased.top_ids == top.indices.tolist()
    assert biased.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
    assert greedy is not None
    assert greedy.chosen == pytest.approx(float(expected[2].max()), abs=1e-5)
    assert greedy.top_ids == []


def test_padding_of_the_vocabulary_is_never_chosen() -> None:
    logits = torch.full((100, VOCAB), -3.0)
    logits[:, 50:] = -torch.inf
    sampling = [RowSampling(temperature=5.0, seed=seed, top_p=0.99 if seed % 2 else 1.0) for seed in range(100)]
    assert max(ids_of(logits, sampling, ranks=3)) < 50


@pytest.mark.parametrize("others", [{}, {"top_k": 5, "temperature": 1.0}])
def test_rules_that_raise_end_their_row_only(monkeypatch: pytest.MonkeyPatch, others: dict[str, float]) -> None:
    def raise_for_a_bias_of_9(logits_V: Tensor, first_id: int, row: RowSampling, *rest: object) -> None:
        if row.logit_bias == LogitBias.of([(1, 9.0)]):
            raise IndexError("index 1 is out of bounds")
        apply_rules(logits_V, first_id, row, *rest)  # type: ignore[arg-type]

    good = RowSampling(logit_bias=LogitBias.of([(7, 90.0)]), **others)  # type: ignore[arg-type]
    bad = RowSampling(logit_bias=LogitBias.of([(1, 9.0)]))
    monkeypatch.setattr(sampler, "apply_rules", raise_for_a_bias_of_9)
    sampled = choose(torch.zeros(4, VOCAB), [good, bad, good, bad])
    assert sampled.ids_S[[0, 2]].tolist() == [7, 7]
    assert sampled.failures == [(row, "internal error in its sampling rules (IndexError)") for row in (1, 3)]
