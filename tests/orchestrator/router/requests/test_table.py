"""Which ended requests a router remembers for clients that have missed the end."""

from types import SimpleNamespace
from typing import cast

import pytest

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.socket import FrontSocket
from mgpu.orchestrator.router.requests import table as module
from mgpu.orchestrator.router.requests.routed_request import RoutedChoice, RoutedRequest
from mgpu.orchestrator.router.requests.table import RoutedTable

ACCOUNT = Account("pid:1", "uid:0 01")


def ended(table: RoutedTable, request_id: int, is_resumable: bool = True) -> RoutedRequest:
    routed = RoutedRequest(b"c", ACCOUNT, request_id, {}, "s", request_id, is_resumable, None, [RoutedChoice()])
    table.add(routed)
    table.end(routed, routed.finished())
    return routed


def test_the_last_ended_requests_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_REQUESTS", 3)
    table = RoutedTable(cast(FrontSocket, SimpleNamespace(send_body=lambda *_: None)))
    ended(table, 9, is_resumable=False)
    kept = [ended(table, at) for at in range(4)]
    assert [table.named("s", at) for at in (0, 1, 2, 3, 9)] == [None, *kept[1:], None]
    assert len(table) == 0
    kept[1].ended_s, kept[2].ended_s, kept[3].ended_s = 10.0, 11.0, 12.0
    table.prune(11.0 + module.KEEP_S)
    assert [table.named("s", at) for at in (1, 2, 3)] == [None, None, kept[3]]
