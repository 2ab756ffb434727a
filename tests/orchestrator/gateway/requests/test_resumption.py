"""The states of a resumption: clients, the engine and the clock can only cause the transitions in the table."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.servers.resuming_gateway import A, B, ResumingGateway, portion
from mgpu.orchestrator.gateway.front.account import account_of
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests import quota, record_queue
from mgpu.orchestrator.gateway.requests.resumption import TRANSITIONS, Resumption, ResumptionState
from mgpu.protocol.front.client_messages import ResumeRequest

EVENTS = st.tuples(st.sampled_from(["resume", "cancel", "answer", "end", "clock"]), st.integers(0, 11))


@pytest.mark.parametrize("state", ResumptionState)
def test_a_transition_that_is_not_in_the_table_is_our_own_mistake(state: ResumptionState) -> None:
    for other in ResumptionState:
        resumption = Resumption(A, "", ResumeRequest(1, "s", (0,)), 0.0, state)
        if other in TRANSITIONS[state]:
            resumption.move_to(other)
            assert resumption.state is other
        else:
            with pytest.raises(AssertionError, match=f"cannot go from {state.name} to {other.name}"):
                resumption.move_to(other)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_no_order_of_events_causes_another_transition_or_leaves_anything_behind(events: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_queue, "MAX_RECORDS_AT_ONCE", 2)
        patch.setattr(quota, "MAX_QUESTIONS_OF_ACCOUNT", 3)
        gateway, now = ResumingGateway(max_client_requests=1), time.monotonic()
        for event, number in events:
            connection, session = (A, B)[number % 2], "stu"[number % 3]
            requests = list(gateway.table)
            if event == "resume":
                with contextlib.suppress(Refusal):
                    gateway.resume(connection, session, (number % 2,))
            elif event == "cancel":
                gateway.resumptions.cancel(connection, account_of("uid:0", connection, "pid:1"), 1)
            elif event == "answer" and gateway.questions:
                finish = "stop" if number % 4 == 0 else ""
                gateway.answer(-1 - number % len(gateway.questions), portion([1, 2], 2 + number % 3, finish, number))
            elif event == "end" and requests:
                gateway.table.remove(requests[number % len(requests)])
            elif event == "clock":
                now += number
                gateway.resumptions.give_up_overdue(now)
                gateway.resumptions.drop_orphans(now)
        gateway.resumptions.give_up_overdue(now + 1000)
        gateway.resumptions.drop_orphans(now + 1000)
    assert (gateway.quota.num_questions, gateway.resumptions._waiting, gateway.resumptions._orphans) == (0, {}, {})
    assert not any(choice.is_replaying for request in gateway.table for choice in request.choices)
