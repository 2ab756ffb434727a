"""One copy of the server as the router sees it: its connection, its state, and what it works on."""

import itertools
import logging
import time
from pathlib import Path

from mgpu.orchestrator.router.requests.affinity import PrefixKeys
from mgpu.orchestrator.router.requests.part import Part
from mgpu.protocol.client.transport.session import Session
from mgpu.protocol.errors import MgpuError, ServerUnreachable
from mgpu.protocol.front.server_messages import Health, Models, Stats
from mgpu.protocol.keys import ClientKeys

ASK_INTERVAL_S = 0.5
"""How often it is asked for its state and counters."""
SILENT_S = 15.0
"""A server says something about each request once a second; after this much silence it counts as lost."""
LOST_S = 6.0
"""How long its gateway may be away before the requests go elsewhere; a new gateway takes a second or two."""
RUNNING_TOKENS = 8
"""What a request that decodes counts for, beside prompts that wait."""
MESSAGES_AT_ONCE = 16
"""Sent to one replica; with fewer the turn is waited for."""
MESSAGES_PER_TURN = 500
"""Of one replica, so that a fast one holds up neither clients nor the other replicas."""
_FIRST_QUERY = 1 << 62
_TAKING = ("ready", "stalled", "recovering")

log = logging.getLogger(__name__)


class Replica:
    """A server behind the router. It may be started again under another endpoint: `connect`."""

    def __init__(self, name: str, keys: str | Path | ClientKeys | None = None) -> None:
        self.name = name
        self.session: Session | None = None
        self.prefixes = PrefixKeys()
        self.health: Health | None = None
        """The last that it has said; None while it is not known."""
        self.models: list[dict[str, object]] = []
        self.difference = ""
        """In what it differs from the other replicas, so that it gets no requests."""
        self.counters: dict[str, float] = {}
        self.is_held = False
        """It gets no new requests: it is about to be stopped."""
        self.parts: dict[int, Part] = {}
        """What it works on, by the id that it knows."""
        self.load = 0
        """Tokens of prompts that wait there, and something for each request that decodes."""
        self._keys = keys
        self._numbers = itertools.count(_FIRST_QUERY)
        self._asked: dict[str, int] = {}
        self._told_models = False
        """On this connection."""
        self._next_ask_s = 0.0
        self._seen_s = time.monotonic()
        """When it was last connected."""
        self._heard_s = time.monotonic()
        """When it last answered a question."""

    def connect(self, endpoint: str) -> None:
        """Begin to connect. Requests on an earlier connection must have been taken off it."""
        self.disconnect()
        self.session = Session(endpoint, self._keys, takes_batches=True)
        self.session.channel.bundle(MESSAGES_AT_ONCE)
        self._seen_s = self._heard_s = time.monotonic()

    def disconnect(self) -> None:
        """Close the connection; what runs there fails."""
        session, self.session = self.session, None
        self._forget_state()
        self._asked.clear()
        self.prefixes.clear()
        if session is not None:
            session.close()

    def _forget_state(self) -> None:
        """Trust nothing that it has said: what connects next may be another server."""
        self.health, self._told_models = None, False

    # ------------------------------------------------------------------ state

    @property
    def is_connected(self) -> bool:
        return self.session is not None and self.session.channel.is_connected

    @property
    def state(self) -> str:
        """Return its own word, or ``unreachable``."""
        return self.health.state if self.is_connected and self.health is not None else "unreachable"

    @property
    def is_ready(self) -> bool:
        return self.health is not None and self.health.state == "ready" and self.is_connected

    @property
    def takes_requests(self) -> bool:
        health, session = self.health, self.session  # asked for each request, so not in terms of `state`
        if health is None or session is None or self.is_held or self.difference or not self._told_models:
            return False
        return session.channel.is_connected and health.state in _TAKING

    @property
    def is_known(self) -> bool:
        """Return whether it has said on this connection if it takes requests."""
        return self.is_connected and self.health is not None and (self._told_models or self.health.state not in _TAKING)

    @property
    def served(self) -> str:
        """Return what it serves, in words by which replicas are compared; empty if it has not told on this connection.

        The name and the vocabulary: a request goes on elsewhere from its token ids.
        """
        if not (self._told_models and self.models and self.is_connected):
            return ""
        return f"{self.models[0].get('name')} (vocabulary of {self.models[0].get('vocab_size', '?')})"

    @property
    def problem(self) -> str:
        """Return why it gets no requests, if it is known and can be helped; else nothing."""
        refusal = None if self.session is None or self.is_connected else self.session.channel.refusal
        return self.difference if refusal is None else str(refusal)

    def is_lost(self, now_s: float) -> bool:
        """Return whether its requests should go elsewhere."""
        if self.session is None or self.session.channel.server_has_ended():
            return True
        silent_s = now_s - (self._heard_s if self.is_connected else self._seen_s)
        return silent_s > (SILENT_S if self.is_connected else LOST_S)

    # --------------------------------------------------------------- messages

    def begin(self, part: Part) -> bool:
        """Send it a request; return False if it cannot be sent."""
        assert self.session is not None
        try:
            self.session.begin(part.request)
        except ServerUnreachable:
            return False
        self.add(part)
        return True

    def add(self, part: Part) -> None:
        """Count a request to what it works on."""
        self.forget(part)
        self.parts[part.request.id] = part
        self.load += part.waiting_tokens + RUNNING_TOKENS

    def forget(self, part: Part) -> None:
        """Count a request no more."""
        if self.parts.get(part.request.id) is part:
            del self.parts[part.request.id]
            self.load -= part.waiting_tokens + RUNNING_TOKENS

    def note_begun(self, part: Part) -> None:
        """Note that the prompt of a request has been computed."""
        self.forget(part)
        part.has_tokens = True
        self.add(part)

    def cancel(self, part: Part) -> None:
        """End a request there, without another word from it."""
        self.forget(part)
        if self.session is not None:
            self.session.cancel(part.request)

    def new_id(self) -> int:
        """Return an id for a question."""
        return next(self._numbers)

    def receive(self) -> None:
        """Handle what has arrived; requests hear of it by themselves."""
        if self.session is None:
            return
        self.session.receive(MESSAGES_PER_TURN)
        now_s = time.monotonic()
        if self.is_connected:
            self._seen_s = now_s
        elif self.health is not None and self.session.channel.was_connected:
            self._forget_state()
        self._take_replies(now_s)

    def send(self) -> None:
        """Send what `begin`, `cancel` and `ask` have kept for it. Call it several times a turn."""
        if self.session is not None:
            self.session.channel.flush()

    def ask(self, now_s: float) -> None:
        """Ask for its state and counters, if it is time."""
        if now_s < self._next_ask_s or not self.is_connected:
            return
        self._next_ask_s = now_s + ASK_INTERVAL_S
        assert self.session is not None
        for kind in ("health", "models", "stats"):
            if kind in self._asked or (kind == "models" and self._told_models):
                continue
            try:
                self._asked[kind] = self.session.ask({"type": kind, "id": self.new_id()})
            except MgpuError as error:
                log.debug("%s was not asked for %s: %s", self.name, kind, error)

    def _take_replies(self, now_s: float) -> None:
        assert self.session is not None
        for kind, number in list(self._asked.items()):
            if not self.session.has_reply(number):
                if not self.is_connected:
                    self.session.forget(number)
                    del self._asked[kind]
                continue
            del self._asked[kind]
            self._heard_s = now_s
            try:
                if kind == "health":
                    self._note(self.session.take_reply(number, Health))
                elif kind == "models":
                    self.models = self.session.take_reply(number, Models).models
                    self._told_models = True
                else:
                    self.counters = self.session.take_reply(number, Stats).counters
            except MgpuError as error:
                log.debug("%s did not tell its %s: %s", self.name, kind, error)

    def _note(self, health: Health) -> None:
        if self.health is not None and health.restarts != self.health.restarts:
            self.prefixes.clear()
        if self.health is not None and health.model != self.health.model:
            self._told_models = False
        self.health = health
        self.prefixes.room_tokens = health.kv_tokens
