"""Who is next, in tokens: shares by weight, however many requests a client has."""

import random
from array import array
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgpu.orchestrator.scheduler.fair_queue import Account, FairQueue
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.internal.worker_messages import RowSampling


class Line:
    """A queue, and one server that runs one request after the other."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.served: Counter[int] = Counter()
        self._arrivals = 0

    def add(self, *account: int, prompt: int = 10, room: int = 10, priority: int = 0, weight: float = 1.0) -> Sequence:
        """Add a sequence of an account, or of a part of one; ``weight`` is that of the account."""
        seq = Sequence(
            sequence_id=self._arrivals, tokens=array("i", [1] * prompt), prompt_len=prompt, max_len=prompt + room,
            stop_ids=frozenset(), sampling=RowSampling(), cache_salt=b"", order=(priority, self._arrivals),
            account=account, weights=(weight, *[1.0] * len(account))[: len(account)],
        )  # fmt: skip
        self._arrivals += 1
        self.queue.push(seq)
        return seq

    def serve(self, answer: int | None = None) -> Sequence:
        """Run the next request to its end, of ``answer`` tokens or as many as it may have."""
        seq = self.queue.pop()
        self.finish(seq, answer)
        return seq

    def finish(self, seq: Sequence, answer: int | None = None) -> None:
        """End one that runs."""
        count = seq.max_len - seq.prompt_len if answer is None else answer
        seq.tokens.extend([2] * count)
        seq.finished = True
        self.queue.settle(seq)
        self.served[seq.account[0]] += len(seq.tokens)

    def drop(self, seq: Sequence) -> None:
        seq.finished = True
        self.queue.drop(seq)


@pytest.fixture
def line() -> Line:
    return Line()


def test_clients_take_turns_whatever_the_order_of_arrival(line: Line) -> None:
    for client in (1, 1, 1, 2, 2, 3):
        line.add(client)
    assert [line.serve().account[0] for _ in range(6)] == [1, 2, 3, 1, 2, 1]


def test_one_request_is_next_however_many_another_client_has(line: Line) -> None:
    for _ in range(1000):
        line.add(1)
    for _ in range(10):
        line.serve()
    line.add(2)
    assert 2 in [line.serve().account[0] for _ in range(2)]


def test_within_a_client_the_lower_priority_number_then_the_earlier_is_next(line: Line) -> None:
    seqs = [line.add(1, priority=priority) for priority in (0, 5, -5, 0)]
    assert [line.serve() for _ in range(4)] == [seqs[2], seqs[0], seqs[3], seqs[1]]


def test_shares_are_in_tokens_not_in_requests(line: Line) -> None:
    for _ in range(400):
        line.add(1, prompt=10, room=10)
        line.add(2, prompt=100, room=100)
    for _ in range(200):
        line.serve()
    assert line.served[1] == pytest.approx(line.served[2], abs=400)


def test_shares_follow_the_weights(line: Line) -> None:
    for _ in range(600):
        line.add(1, weight=3.0)
        line.add(2, weight=1.0)
    for _ in range(400):
        line.serve()
    assert line.served[1] / line.served[2] == pytest.approx(3, rel=0.05)


def test_who_asks_for_much_and_takes_little_pays_for_little(line: Line) -> None:
    """Both are charged the same guess; only what came out counts in the end."""
    for _ in range(2000):
        line.add(1, room=10_000)
        line.add(2, room=10_000)
    answers = {1: 5, 2: 400}
    for _ in range(1000):
        head = line.queue.head()
        assert head is not None
        line.serve(answers[head.account[0]])
    assert line.served[1] == pytest.approx(line.served[2], rel=0.1)


def test_nobody_saves_up_turns_by_being_away(line: Line) -> None:
    for _ in range(300):
        line.add(1)
    for _ in range(200):
        line.serve()
    for _ in range(100):
        line.add(2)
    assert Counter(line.serve().account[0] for _ in range(100)) == pytest.approx({1: 50, 2: 50}, abs=1)


def test_nobody_pays_for_having_been_alone(line: Line) -> None:
    for _ in range(200):
        line.add(1)
        line.serve()
    for _ in range(10):
        line.add(1)
        line.add(2)
    assert Counter(line.serve().account[0] for _ in range(10)) == {1: 5, 2: 5}


def test_a_client_that_leaves_for_a_moment_still_owes_what_it_took(line: Line) -> None:
    line.add(1, prompt=1000)
    for _ in range(60):
        line.add(2)
    assert line.serve().account == (1,)
    line.add(1)
    clients = [line.serve().account[0] for _ in range(52)]
    assert clients.count(1) == 1
    assert clients.index(1) > 45


def test_what_ended_in_line_is_never_next_and_does_not_pile_up(line: Line) -> None:
    keeper = line.add(2)
    for _ in range(500):
        line.drop(line.add(1))
    assert num_held(line.queue) < 150
    assert len(line.queue) == 1
    assert line.serve() is keeper
    assert line.queue.head() is None
    assert num_held(line.queue) == 0


def accounts_of(account: Account) -> list[Account]:
    """Return an account and all of its parts."""
    return [account, *(each for part in account.parts.values() for each in accounts_of(part))]


def num_held(queue: FairQueue) -> int:
    """Return the requests in memory: waiting ones, and some that ended in line."""
    return sum(len(account.waiting) for account in accounts_of(queue._all))


def assert_books_are_right(queue: FairQueue) -> None:
    """Recount what the queue keeps count of."""
    waiting = [seq for account in accounts_of(queue._all) for _, seq in account.waiting]
    assert queue._num_ended == sum(seq.finished for seq in waiting)
    for account in accounts_of(queue._all):
        held = [seq for each in accounts_of(account) for _, seq in each.waiting]
        assert account.num_waiting == sum(not seq.finished for seq in held)
        in_line = [part for part in account.parts.values() if part.entry >= 0]
        assert account.weight_in_line == pytest.approx(sum(part.counted for part in in_line))
        assert {id(each) for _, entry, each in account.line if each.entry == entry} == {id(each) for each in in_line}


def test_a_request_that_outlives_its_line_changes_nothing_in_the_next_one(line: Line) -> None:
    first, second = line.add(1), line.add(1, prompt=1000)
    line.drop(second)
    assert line.queue.pop() is first
    for client in (2, 3, 4):
        line.add(client)
    now = line.queue._all.now
    assert not line.queue._charges, "what runs does not keep what ended in memory"
    line.finish(first)
    assert_books_are_right(line.queue)
    assert line.queue._all.now == now, "what was charged before nobody waited is not corrected after"
    assert [line.serve().account[0] for _ in range(3)] == [2, 3, 4]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "pop", "drop", "finish", "hold"]), st.integers(0, 30)), max_size=80))
def test_the_books_are_right_whatever_begins_and_ends_in_whatever_order(actions: list[tuple[str, int]]) -> None:
    line, paths = Line(), [(0,), (1, 1), (1, 2), (2, 1, 1)]
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    for action, number in actions:
        if action == "add":
            waiting.append(line.add(*paths[number % 4], weight=1.0 + number % 3))
        elif action == "pop" and line.queue.head() is not None:
            running.append(line.queue.pop())
            waiting.remove(running[-1])
        elif action == "drop" and waiting:
            line.drop(waiting.pop(number % len(waiting)))
        elif action == "finish" and running:
            line.finish(running.pop(number % len(running)), number)
        elif action == "hold":
            line.queue.hold({at for at in range(3) if number >> at & 1})
        assert_books_are_right(line.queue)


def test_an_endless_row_of_newcomers_does_not_starve_who_was_served_before(line: Line) -> None:
    line.add(1)
    line.add(2)
    line.serve()
    mine = line.add(1)
    for newcomer in range(3, 100):
        line.add(newcomer)
        if line.serve() is mine:
            break
    else:
        pytest.fail("97 newcomers went first")


def test_a_debt_outlasts_the_forgetting_of_others(line: Line) -> None:
    line.add(1, prompt=500, room=1)
    line.add(2)
    assert line.serve().account == (1,)  # it has nothing in line now, and owes its share of 500 tokens
    for newcomer in range(100, 180):  # more than are kept without a look
        line.add(newcomer)
    mine, other = line.add(1), line.add(3)
    order = [line.serve() for _ in range(83)]
    assert order.index(other) < order.index(mine)
    assert order[-1] is mine


def test_clients_that_come_and_go_are_forgotten(line: Line) -> None:
    for _ in range(20):
        line.add(0)
    for client in range(1, 30_000):
        line.add(client, prompt=1, room=1)
        line.serve(1)
    assert len(line.queue._all.parts) < 10_000
    assert len(line.queue._all.line) < 30_000


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=2, max_size=4))
def test_clients_that_always_wait_never_differ_by_more_than_a_few_requests(seed: int, weights: list[float]) -> None:
    """The bound of start-time fair queueing: two largest costs, each divided by its client's weight."""
    rng = random.Random(seed)
    line = Line()
    waiting = dict.fromkeys(range(len(weights)), 0)
    largest = 0
    for _ in range(300):
        for client, weight in enumerate(weights):
            while waiting[client] < 3:
                line.add(client, prompt=rng.randint(1, 100), room=rng.randint(1, 300), weight=weight)
                waiting[client] += 1
        seq = line.serve()
        largest = max(largest, len(seq.tokens))
        waiting[seq.account[0]] -= 1
        normalized = [line.served[client] / weight for client, weight in enumerate(weights)]
        bound = 2 * 400 / min(weights) + 2 * 400
        assert max(normalized) - min(normalized) <= bound


def test_an_account_gains_nothing_by_having_many_parts(line: Line) -> None:
    """1,200 names that one connection has invented are one share, and so are 1,200 connections of one process."""
    for part in range(1200):
        line.add(1, part)
        line.add(2, part, part)
    for _ in range(1200):
        line.add(3, 1)
    for _ in range(900):
        line.serve()
    assert line.served[1] == pytest.approx(line.served[2], abs=100)
    assert line.served[1] == pytest.approx(line.served[3], abs=100)


def test_a_newcomer_does_not_stand_behind_the_parts_of_another_account(line: Line) -> None:
    for part in range(1200):
        line.add(1, part)
    for _ in range(100):
        line.serve()
    line.add(2, 7)
    assert 2 in [line.serve().account[0] for _ in range(2)]


def test_parts_divide_the_share_of_their_account(line: Line) -> None:
    for _ in range(300):
        for path in ((1, 1), (1, 2), (2, 1)):
            line.add(*path)
    parts = Counter(line.serve().account for _ in range(400))
    assert parts == pytest.approx({(1, 1): 100, (1, 2): 100, (2, 1): 200}, abs=3)


def test_priorities_count_within_a_part_alone(line: Line) -> None:
    line.add(1, 1, priority=5)
    line.add(1, 1, priority=-5)
    line.add(1, 2, priority=1000)
    assert [line.serve().order[0] for _ in range(3)] == [-5, 1000, 5]


def test_a_held_account_is_not_next_and_keeps_its_turn(line: Line) -> None:
    mine = [line.add(1, 1) for _ in range(2)]
    line.queue.hold({1, 5})
    assert line.queue.head() is None
    other = line.add(2)
    late = line.add(1, 2)
    assert line.serve() is other
    line.add(2)
    line.queue.hold(set())
    order = [line.serve() for _ in range(4)]
    assert order.index(mine[0]) < order.index(late) < order.index(mine[1]), "as if it had not been held"
    assert_books_are_right(line.queue)


def test_nobody_saves_up_turns_while_it_is_held(line: Line) -> None:
    line.queue.hold({1})
    for _ in range(100):
        line.add(2)
    for _ in range(50):
        line.serve()
    for _ in range(50):
        line.add(1)
    line.queue.hold(set())
    served = Counter(line.serve().account[0] for _ in range(50))
    assert served == pytest.approx({1: 25, 2: 25}, abs=2)


def test_tokens_that_are_costly_to_choose_are_charged_for_what_they_cost(line: Line) -> None:
    for _ in range(400):
        line.add(1).token_cost = 4
        line.add(2)
    for _ in range(200):
        line.serve()
    assert line.served[2] / line.served[1] == pytest.approx(50 / 20, rel=0.1)
