"""A stream of events ends when its client has gone, also if that shows only by what it does not take."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mgpu.orchestrator.http.edge import event_stream
from mgpu.orchestrator.http.edge.event_stream import EventStream


def test_a_client_that_takes_nothing_ends_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SEND_TIMEOUT_S", 0.02)
    closed = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def takes_the_head_only(message: Any) -> None:
        if message["type"] != "http.response.start":
            await never()

    asyncio.run(asyncio.wait_for(EventStream(events(), {})({}, never, takes_the_head_only), 20))
    assert closed == [True]
