"""What clients have sent and nobody has looked at yet, in turns by owner and account.

The ROUTER hands out messages connection by connection, and no connection can be left out. So the inbox reads ahead a
little, and owners take turns from there, however many connections each of them has. While an owner has `FULL_BYTES`
here, nothing more is read, and its senders soon meet full pipes. But others may wait behind them. So every few
milliseconds one lap is read all the same: until a connection comes up again, which means that each connection with a
message has been read once. What a flood brings along in these laps piles up, so it has a bound too: a connection whose
account would have more than `MAX_BYTES` here is given up. One connection alone does not get there, because more is
served between two laps than a lap brings.

What a connection has sent that has ended meanwhile is dropped: nobody would hear the answers. libzmq reports the end
only when everything before it was read, so of an owner with `FULL_BYTES` each connection is looked at, and ended if its
peer is gone. A flood of clients that connect, send and leave costs no more than reading a little of it.
"""

import time
from collections.abc import Callable

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.fair_turns import FairTurns, Path
from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S
from mgpu.orchestrator.gateway.front.socket import FrontSocket, Received
from mgpu.protocol.front.framing import MAX_FRAMES
from mgpu.protocol.front.server_messages import Failed

FULL_BYTES = 64 << 10
MAX_BYTES = 16 << 20
"""Of one account. Whoever waits for answers within the limits of requests never has as much here."""
MAX_TOTAL_BYTES = 128 << 20
"""Of all; beyond it the largest account of the owner that has most is given up with all of its connections."""
OVERHEAD_BYTES = 1024
"""What a message counts for however short it is."""
MIN_PAUSE_S, MAX_PAUSE_S = 0.002, 0.02
"""Between two laps. The more a lap takes, the longer the pause, so that most of the time is left for serving."""
PAUSE_PER_READING, PAUSE_S_PER_BYTE = 2.0, 0.02 / (1 << 20)
READ_AT_ONCE_S = 0.001
"""Spent on reading before the next message is served."""

GIVEN_UP = {
    "slow": Failed(
        None, "slow_reader", "messages were not read fast enough; everything in flight on this connection has ended"
    ),
    "flooding": Failed(
        None,
        "overloaded",
        f"more than {MAX_BYTES >> 20} MiB of messages wait to be read; they were dropped, and everything in flight on "
        "this connection has ended",
        RETRY_AFTER_S,
    ),
}
"""What the client of a connection is told that was given up."""


class Inbox:
    """Reads the front socket and has every message handled when it is its account's turn."""

    def __init__(
        self,
        front: FrontSocket,
        turns: FairTurns[Received],
        handle: Callable[[Received], None],
        quantum_s: float = 0.0,
        charge: Callable[[str, float], None] = lambda _owner, _seconds: None,
    ) -> None:
        """``quantum_s``: for so long, messages of one account are handled in a row, and nothing new is read.

        Each reading and each turn has a price of its own. Where handling a message is cheap, so is a short wait.
        ``charge`` is told what each owner has cost.
        """
        self._front = front
        self._charge_owner = charge
        self._handle = handle
        self._quantum_s = quantum_s
        self._turns = turns
        self._full: set[str] = set()
        self._looked_at: set[bytes] = set()
        """Connections of these owners that were still open earlier in this turn."""
        self._lap: set[bytes] = set()
        """The connections that have been read in this lap."""
        self._lap_s, self._lap_bytes = 0.0, 0
        """What this lap has cost so far."""
        self._next_lap_s = 0.0
        self.is_behind = False
        """The last turn has left messages unread."""
        self._skipped: Account | None = None
        """Whose message has too many frames: the socket skips the rest of it before the next message."""

    def __bool__(self) -> bool:
        """Return whether a message waits here."""
        return bool(self._turns)

    def serve(self, seconds: float, may: Callable[[str], bool] | None = None) -> None:
        """Read and handle messages until none is left or the time is over; the last one may take longer.

        With ``may``, those of owners for whom it is false are read but not handled.
        """
        self._front.begin_turn()
        self._looked_at.clear()
        now_s = read_at_s = time.perf_counter()
        end_s = now_s + seconds
        while now_s < end_s:
            if now_s >= read_at_s:
                self._read()
                read_at_s = now_s + self._quantum_s
            taken = self._turns.take(may)
            if taken is None:
                self.is_behind = may is not None or self._front.is_skipping
                return
            now_s = self._serve_account(*taken)
        self.is_behind = True

    def _serve_account(self, path: Path, received: Received | None) -> float:
        """Handle messages of one account, and charge it; return the time."""
        owner = path[0]
        began_s = now_s = time.perf_counter()
        until_s = began_s + self._quantum_s
        while received is not None:
            if not self._is_useless(received):
                self._handle(received)
            now_s = time.perf_counter()
            received = self._turns.take_more(path) if now_s < until_s else None
        self._note_room(owner)
        self._turns.charge(path, now_s - began_s)
        self._charge_owner(owner, now_s - began_s)
        return now_s

    def _read(self) -> None:
        """Read what waits in the socket, as far as there is room or a lap is due."""
        now_s = time.perf_counter()
        end_s = now_s + READ_AT_ONCE_S
        costs: dict[Path, float] = {}
        while now_s < end_s and self._may_read():
            received = self._front.receive()
            began_s, now_s = now_s, time.perf_counter()
            account = self._skipped or (None if received is None else received.account)
            if account is not None:
                path = account.path
                costs[path] = costs.get(path, 0.0) + now_s - began_s
            if received is None:
                self._end_lap()
                break
            self._skipped = account if len(received.frames) > MAX_FRAMES else None
            self._note_lap(received, now_s - began_s)
            if received.is_open and not self._is_useless(received):
                self._add(received)
        for path, cost_s in costs.items():
            self._turns.charge_beside(path, cost_s)
            self._charge_owner(path[0], cost_s)

    def _is_useless(self, received: Received) -> bool:
        """Return whether the sender has left, if its owner has sent so much that it is worth asking."""
        if received.owner not in self._full or received.connection in self._looked_at:
            return False
        if self._front.connections.end_if_left(received.connection):
            return True
        self._looked_at.add(received.connection)
        return False

    def _may_read(self) -> bool:
        return not self._full or time.monotonic() >= self._next_lap_s

    def _note_lap(self, received: Received, cost_s: float) -> None:
        if received.connection in self._lap:
            self._end_lap()
        self._lap.add(received.connection)
        self._lap_s += cost_s
        self._lap_bytes += received.nbytes

    def _end_lap(self) -> None:
        pause_s = max(MIN_PAUSE_S, self._lap_s * PAUSE_PER_READING, self._lap_bytes * PAUSE_S_PER_BYTE)
        self._next_lap_s = time.monotonic() + min(pause_s, MAX_PAUSE_S)
        self._lap.clear()
        self._lap_s, self._lap_bytes = 0.0, 0

    def _add(self, received: Received) -> None:
        account, size = received.account, received.nbytes + OVERHEAD_BYTES
        path = account.path
        if self._turns.bytes_of(path) + size > MAX_BYTES:
            self._give_up(account, received.connection)
            return
        self._turns.put(path, received, size)
        if self._turns.bytes_of((account.owner,)) >= FULL_BYTES:
            self._full.add(account.owner)
        if self._turns.nbytes > MAX_TOTAL_BYTES:
            owner, *_ = largest = self._turns.largest()
            for each in {message.connection for message in self._turns.remove(largest)}:
                self._front.drop_sender(each)
            self._note_room(owner)

    def _give_up(self, account: Account, connection: bytes) -> None:
        """Drop what a connection has sent. What it has in flight ends too, so that nothing waits for an answer."""
        self._turns.remove(account.path, lambda message: message.connection == connection)
        self._front.drop_sender(connection)
        self._note_room(account.owner)

    def _note_room(self, owner: str) -> None:
        if self._full and self._turns.bytes_of((owner,)) < FULL_BYTES:
            self._full.discard(owner)
