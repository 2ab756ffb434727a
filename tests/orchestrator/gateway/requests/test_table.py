"""The requests in flight, and what they hold by the books."""

import pytest

from harness.servers.resuming_gateway import SIZE, A, B, new_choice
from mgpu.orchestrator.gateway.front.account import Account, account_of
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.orchestrator.gateway.requests.quota import MAX_DROPPED, Quota
from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.orchestrator.gateway.requests.table import RequestTable
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.internal.client_limits import ClientLimits


def test_cancelled_sequences_count_until_the_engine_has_ended_them() -> None:
    quota = Quota(ClientLimits(max_client_requests=10**6, max_sequences=10**6))
    table, account = RequestTable(quota), account_of("", A, "")
    for number in range(MAX_DROPPED):
        quota.check(account, SIZE, 1)
        request = Request(A, Generate(number), 0.0, None, size=0)
        table.add(request)
        table.start(request, [new_choice(request.spec, 0, number, [])])
        table.remove(request)
    assert quota.usage_of(account).dropped == MAX_DROPPED
    with pytest.raises(Refusal, match=f"cancelled {MAX_DROPPED} sequences"):
        quota.check(account, SIZE, 1)
    for number in range(MAX_DROPPED):
        quota.ended(number)
    quota.check(account, SIZE, 1)
    assert not quota._usage


class WatchedQuota(Quota):
    """Looks at a request whenever anything is counted, as a thread might that tokenizes its prompt."""

    request: Request
    seen: list[bool]

    def _count(self, account: Account, change: object) -> None:
        self.seen.append(self.request.is_over)
        super()._count(account, change)  # type: ignore[arg-type]


def test_a_request_that_changes_connections_is_never_over_meanwhile() -> None:
    quota = WatchedQuota(ClientLimits())
    quota.request = Request(A, Generate(1, prompt="x", session="s"), 0.0, None, size=SIZE, is_encoding=True)
    quota.seen = []
    table = RequestTable(quota)
    table.add(quota.request)
    table.move(quota.request, B, "")
    assert quota.seen
    assert not any(quota.seen)
    assert quota.usage_of(account_of("", A, "")).requests == 0
    usage = quota.usage_of(account_of("", B, ""))
    assert (usage.requests, usage.queued_bytes, usage.unsubmitted) == (1, SIZE, 1)
    quota.request.is_encoding = False
    table.remove(quota.request)
    assert quota.request.is_over
    assert not quota._usage
    assert not len(table)
