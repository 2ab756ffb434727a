"""What a client may have in flight, by the books."""

import pytest

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.quota import (
    FIRST_RETRY_S,
    MAX_DROPPED,
    MAX_QUESTIONS,
    MAX_RETRY_S,
    MIN_RETRY_S,
    Quota,
    size_of,
)
from mgpu.protocol.internal.client_limits import ClientLimits


def account(name: str) -> Account:
    """Return the account that a name such as "owner name" means; an owner that is alone has one of its own name."""
    owner, _, rest = name.partition(" ")
    return Account(owner, rest or owner)


class Books:
    """A quota, a clock, and requests that go through it."""

    def __init__(self, **limits: int) -> None:
        self.now_s = 100.0
        self.quota = Quota(ClientLimits(**limits), lambda: self.now_s)  # type: ignore[arg-type]
        self._next = 0

    def begin(self, name: str, size: int = 1000, n: int = 1) -> list[int]:
        """Take a request up to its submission, and return its sequences."""
        self.quota.check(account(name), size, n)
        self.quota.arrive(account(name), size, n)
        numbers = list(range(self._next, self._next + n))
        self._next += n
        self.quota.submit(account(name), numbers, size)
        return numbers

    def finish(self, name: str, numbers: list[int]) -> None:
        for number in numbers:
            self.quota.ended(number)
        self.quota.leave(account(name), numbers)

    def refusal(self, name: str, size: int = 1000, n: int = 1) -> str:
        with pytest.raises(Refusal) as refused:
            self.quota.check(account(name), size, n)
        assert refused.value.code == "overloaded"
        assert refused.value.retry_after_s is not None
        assert MIN_RETRY_S <= refused.value.retry_after_s <= MAX_RETRY_S
        return str(refused.value)


def test_one_client_at_its_limit_does_not_keep_others_out() -> None:
    books = Books(max_client_requests=2)
    first = books.begin("a")
    books.begin("a")
    assert "2 requests in flight, the limit is 2" in books.refusal("a")
    books.begin("b")
    books.finish("a", first)
    books.begin("a")


def test_all_choices_of_all_clients_have_a_limit() -> None:
    books = Books(max_sequences=5)
    books.begin("a", n=3)
    books.begin("b")
    assert "4 sequences in flight, the limit is 5" in books.refusal("c", n=2)
    books.begin("c")


def test_one_client_with_many_choices_leaves_room_for_others() -> None:
    books = Books(max_sequences=512)
    for _ in range(8):
        books.begin("a", n=16)
    with pytest.raises(Refusal, match="this client has 128 sequences in flight, the limit is 128"):
        books.begin("a", n=1)
    books.begin("b", n=16)


def test_bytes_count_until_the_first_token() -> None:
    books = Books(max_client_queue=2500)
    numbers = books.begin("a", 1000, n=2)
    books.begin("a", 1000)
    assert "2000 bytes of requests waiting, 1000 more exceed the limit of 2500" in books.refusal("a", 1000)
    books.quota.begun(numbers[0])
    books.begin("a", 1000)
    assert books.quota.queued_bytes == 2500


def test_the_bytes_of_all_clients_have_a_limit_too() -> None:
    books = Books(max_queue=2500)
    books.begin("a", 1000)
    books.begin("b", 1000)
    assert "the server has 2000 bytes" in books.refusal("c", 1000)


def test_a_request_above_the_limit_of_bytes_is_taken_when_nothing_waits() -> None:
    books = Books(max_client_queue=100, max_queue=100)
    books.finish("a", books.begin("a", 5000))
    books.begin("a", 5000)
    books.refusal("a", 1)


def test_asking_and_cancelling_in_a_loop_is_bounded_until_the_engine_has_let_go() -> None:
    books = Books()
    cancelled: list[int] = []
    for _ in range(MAX_DROPPED):
        numbers = books.begin("a", 10)
        books.quota.leave(account("a"), numbers)
        cancelled += numbers
    assert f"cancelled {MAX_DROPPED} sequences" in books.refusal("a", 10)
    books.begin("b", 10)
    books.quota.ended(cancelled[0])
    books.begin("a", 10)


def test_a_prompt_that_a_thread_still_has_weighs_on_after_its_request_is_cancelled() -> None:
    books = Books(max_client_queue=1500)
    books.quota.arrive(account("a"), 1000, 1)
    books.quota.leave(account("a"), [])
    books.refusal("a", 1000)
    books.quota.withdraw(account("a"), 1000, 1)
    books.begin("a", 1000)


def test_nothing_is_remembered_of_clients_without_requests() -> None:
    books = Books()
    for at in range(1000):
        name = f"client{at}"
        numbers = books.begin(name, n=2)
        books.quota.begun(numbers[0])
        if at % 2:
            books.quota.leave(account(name), numbers)
            for number in numbers:
                books.quota.ended(number)
        else:
            books.finish(name, numbers)
    assert not books.quota._usage
    assert not books.quota._open
    assert (books.quota.num_sequences, books.quota.queued_bytes) == (0, 0)


def test_a_request_that_is_resumed_on_another_connection_counts_once() -> None:
    books = Books()
    numbers = books.begin("a", n=2)
    books.quota.leave(account("a"), numbers)
    books.quota.arrive(account("b"), 0, 2)
    books.quota.submit(account("b"), numbers, 0)
    assert books.quota.num_sequences == 2
    assert account("a") not in books.quota._usage
    books.finish("b", numbers)
    assert not books.quota._usage
    assert books.quota.num_sequences == 0


def test_words_about_sequences_of_an_earlier_gateway_are_no_trouble() -> None:
    books = Books()
    books.quota.begun(77)
    books.quota.ended(77)
    assert books.quota.num_sequences == 0


def test_the_time_to_wait_follows_the_rate_of_endings_and_stays_within_bounds() -> None:
    books = Books()
    running = [books.begin("a") for _ in range(160)]
    assert books.quota.retry_after_s() == FIRST_RETRY_S
    for numbers in running[:80]:
        books.now_s += 0.5
        books.finish("a", numbers)
    # Two endings per second; an eighth of the 80 that are left takes five.
    assert books.quota.retry_after_s() == pytest.approx(5, rel=0.1)
    books.now_s += 1000
    assert books.quota.retry_after_s() == MAX_RETRY_S
    for numbers in running[80:]:
        books.finish("a", numbers)
    assert books.quota.retry_after_s() == MIN_RETRY_S


def test_new_limits_hold_for_the_next_request() -> None:
    books = Books(max_client_requests=10)
    books.begin("a")
    books.begin("a")
    books.quota.limits = ClientLimits(max_client_requests=1)
    books.refusal("a")


def fill(books: Books, owner: str, size: int) -> str:
    """Begin requests of one account after another until one is refused; return why."""
    for number in range(512):
        try:
            books.begin(f"{owner} {number}", size)
        except Refusal as refusal:
            return f"{refusal.code}: {refusal}"
    raise AssertionError("nothing was refused")


def test_an_owner_leaves_room_for_newcomers_whatever_parts_it_has() -> None:
    books = Books(max_sequences=512, max_queue=10**6)
    refusal = fill(books, "pid:1", size=10)
    assert "overloaded: the key, process or address of this client has 384 sequences in flight" in refusal
    for owner in range(2, 5):
        fill(books, f"pid:{owner}", size=10)
    assert books.quota.num_sequences < 512
    books.begin("pid:9 newcomer", size=10)


def test_an_owner_leaves_room_for_the_bytes_of_newcomers() -> None:
    books = Books(max_client_queue=1000, max_queue=100_000)
    assert "process or address of this client has 75000 bytes of requests" in fill(books, "pid:1", size=1000)
    books.begin("pid:2 newcomer", size=1000)


def test_the_questions_of_an_owner_leave_room_for_others() -> None:
    books = Books()
    for number in range(MAX_QUESTIONS * 3 // 4):
        books.quota.check_question(account(f"pid:1 {number}"))
        books.quota.count_question(account(f"pid:1 {number}"))
    with pytest.raises(Refusal, match="6144 of its key, process or address"):
        books.quota.check_question(account("pid:1 next"))
    books.quota.check_question(account("pid:2 newcomer"))


def test_what_one_owner_names_is_not_what_another_names() -> None:
    books = Books(max_client_requests=1)
    books.begin("pid:1 client:alice")
    books.begin("pid:2 client:alice")
    books.refusal("pid:1 client:alice")


def test_a_few_sequences_are_all_for_one_owner_if_nobody_else_asks() -> None:
    books = Books(max_sequences=8)
    for number in range(8):
        books.begin(f"pid:1 {number}")


def test_every_choice_holds_the_prompt() -> None:
    assert size_of(1000, 16) == 16 * size_of(1000, 1) > 16_000
