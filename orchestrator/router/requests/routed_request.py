"""One request on its way through the router: what its client asked for, what has been passed on, and where it runs.

A request runs in one part, on one replica. If that replica is lost, each choice that has not ended becomes a part of
its own on another replica, which begins with the tokens that have been passed on (`emitted_ids`).

    parts                                   client
    replica 0: choices 0 1   tokens ...     accepted, tokens of 0 and 1
    replica 0 dies; choice 0 has ended
    replica 1: choice 1, after its tokens   the next tokens of 1, finished
"""

from array import array
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from mgpu.orchestrator.gateway.front.account import Account
from mgpu.orchestrator.gateway.front.refusal import Refusal
from mgpu.protocol.front.fields import int32_bytes
from mgpu.protocol.front.seeds import seed_of_choice
from mgpu.protocol.front.server_messages import Accepted

MAX_MESSAGES = 512
"""Kept of each choice: more than a client can have missed whose connection was lost."""

PassedOn = tuple[bytes, int, bool]
"""A message of tokens as its client was sent it, how many tokens it has, and whether it is the last of its choice."""


@dataclass(slots=True)
class RoutedChoice:
    """What has been passed on of one choice."""

    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    finish_reason: str | None = None
    messages: deque[PassedOn] = field(default_factory=lambda: deque(maxlen=MAX_MESSAGES))
    """The last, for a client that comes back."""
    first: int = 0
    """How many tokens the client had before this router knew the request."""

    @property
    def offset(self) -> int:
        """How many tokens of it there are, -1 once it has ended; as a `resume` says it."""
        return self.first + len(self.token_ids) if self.finish_reason is None else -1

    def since(self, offset: int) -> list[bytes]:
        """Return the messages after ``offset`` tokens. Refusal if no message ends there."""
        if offset < 0:
            return []
        count = self.first + len(self.token_ids)
        missing: list[bytes] = []
        for body, num_tokens, is_last in reversed(self.messages):
            if count == offset and (num_tokens or not is_last):
                break
            missing.append(body)
            count -= num_tokens
        if count != offset:
            text = f"offset {offset} does not fit: the choice has {self.first + len(self.token_ids)} tokens so far"
            raise Refusal("bad_request", f"{text}, and the last {len(self.messages)} messages are kept")
        return missing[::-1]


@dataclass(slots=True, eq=False)
class RoutedRequest:
    """A generate request from arrival to its last message."""

    connection: bytes
    account: Account
    """Whose request it is."""
    id: int
    """The client's own."""
    message: Mapping[str, object]
    """What replicas are sent, but for ids and what has been emitted. Empty for a request of an earlier router."""
    session: str
    """By which replicas know the request."""
    upstream_id: int
    """With the session: by which replicas know it."""
    is_resumable: bool
    """Its client has a session of its own."""
    deadline_s: float | None
    choices: list[RoutedChoice]
    keys: list[bytes] = field(default_factory=list)
    """Of its prompt; see affinity.py."""
    prompt_size: int = 0
    """Tokens of the prompt, or about as many."""
    accepted: Accepted | None = None
    accepted_body: bytes = b""
    """The same as its client was sent it."""
    cached_tokens: int = 0
    losses: int = 0
    """How many replicas were lost with it."""
    lost_at: set[str] = field(default_factory=set)
    """Their names: it may still run there, under the id that they know."""
    last_sent_s: float = 0.0
    ended_s: float | None = None
    last: bytes = b""
    """The message that ended it."""

    @property
    def unfinished(self) -> list[int]:
        """The choices that have not ended."""
        return [at for at, choice in enumerate(self.choices) if choice.finish_reason is None]

    def note(self, index: int, token_ids: "array[int]", finish_reason: str | None, body: bytes) -> None:
        """Note a message of tokens that its client was sent."""
        choice = self.choices[index]
        choice.token_ids += token_ids
        choice.finish_reason = finish_reason
        if self.is_resumable:
            choice.messages.append((body, len(token_ids), finish_reason is not None))

    def finished(self) -> dict[str, object]:
        """Return the last message of an answer whose choices have all ended."""
        return {
            "type": "finished",
            "id": self.id,
            "finish_reasons": [choice.finish_reason or "cancelled" for choice in self.choices],
            "prompt_tokens": 0 if self.accepted is None else self.accepted.prompt_tokens,
            "completion_tokens": sum(choice.first + len(choice.token_ids) for choice in self.choices),
            "cached_tokens": self.cached_tokens,
        }

    def message_for(self, indexes: list[int], left_s: float | None) -> dict[str, object]:
        """Return the generate message for a replica that is to make these choices; ``left_s`` is the time they get."""
        message = {**self.message, "session": self.session, "id": self.upstream_id}
        if left_s is not None:
            message["timeout_s"] = max(0.001, left_s)
        if self.accepted is None:
            return message
        message |= {"max_tokens": self.accepted.max_tokens, "seed": self.accepted.seed}
        if len(indexes) < len(self.choices) or any(self.choices[at].token_ids for at in indexes):
            [index] = indexes
            emitted = self.choices[index].token_ids
            seed = seed_of_choice(self.accepted.seed, index)
            message |= {"id": self.upstream_id ^ index, "n": 1, "seed": seed}
            message.pop("emitted_ids", None)
            if emitted:
                message["emitted_ids"] = int32_bytes(list(emitted))
        return message
