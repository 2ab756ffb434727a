"""From a generate message of a client to a request that replicas can be sent.

Only what the router uses of it is checked here. The replica checks all of it, and its refusal reaches the client.
"""

import itertools
import secrets
import time
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from mgpu.orchestrator.gateway.front.account import KEY_PREFIX, NAMED_PREFIX, PART_OF, Account
from mgpu.orchestrator.gateway.front.socket import Received
from mgpu.orchestrator.router.requests.affinity import chunk_keys, prompt_bytes
from mgpu.orchestrator.router.requests.routed_request import RoutedChoice, RoutedRequest
from mgpu.protocol.front.client_messages import GENERATE_RULES
from mgpu.protocol.front.fields import FieldError, int32_array, parse_fields

KEEP_S = 30.0
"""How long replicas go on with the requests of a router that is gone."""
_ACCOUNT_CHARS = 128
_USED = (
    "id", "session", "account", "prompt", "prompt_ids", "messages", "cache_salt", "n", "timeout_s", "emitted_ids"
)  # fmt: skip
_RULES = {name: GENERATE_RULES[name] for name in _USED}


class Arrivals:
    """The names by which replicas know requests."""

    def __init__(self, names_accounts: bool) -> None:
        """``names_accounts``: the replicas are told whose request it is, which a key does not allow."""
        self._names_accounts = names_accounts
        self._own_session = secrets.token_hex(16)
        """For clients that have none."""
        self._own_ids = itertools.count(secrets.randbits(56) << 4, 16)

    def parse(self, data: Mapping[object, object]) -> dict[str, Any]:
        """Return the fields of a generate message that the router uses, checked. FieldError if one is wrong."""
        fields = parse_fields({name: data[name] for name in _USED if name in data}, _RULES)
        if "id" not in fields:
            raise FieldError(f"id is missing; it must be {_RULES['id'].allowed}")
        return fields

    def request(
        self, received: Received, account: Account, data: dict[object, object], fields: Mapping[str, Any]
    ) -> RoutedRequest:
        """Return the request of a message, which counts to ``account``."""
        values = {str(name): value for name, value in data.items() if value is not None}
        values.pop("account", None)
        if self._names_accounts:
            values["account"] = _name_of(account)
        salt = fields.get("cache_salt", "")
        if received.identity.startswith(KEY_PREFIX):
            salt = values["cache_salt"] = _digest(received.identity, salt)
        values["keep_s"] = KEEP_S
        request_id, session, timeout_s = fields["id"], fields.get("session"), fields.get("timeout_s")
        name, upstream_id = self.names(received.identity, session, request_id)
        prompt = prompt_bytes(fields)
        emitted = fields.get("emitted_ids", b"")
        return RoutedRequest(
            received.connection,
            account,
            request_id,
            values,
            name,
            upstream_id,
            session is not None,
            None if timeout_s is None else time.monotonic() + timeout_s,
            [RoutedChoice(int32_array(emitted)) for _ in range(fields.get("n", 1))],
            chunk_keys(prompt, salt),
            max(1, len(prompt) // 4),
        )

    def names(self, identity: str, session: str | None, request_id: int) -> tuple[str, int]:
        """Return session and id by which replicas know a request: those of a client that resumes are found again."""
        if session is None:
            return self._own_session, next(self._own_ids)
        name = _digest(identity if identity.startswith(KEY_PREFIX) else "", session)
        number = blake2b(f"{name} {request_id}".encode(), digest_size=8).digest()
        return name, int.from_bytes(number, "little") >> 6 << 4  # the last bits are for the choices


@lru_cache(4096)
def _name_of(account: Account) -> str:
    """Return the name of an account for the replicas: part of its owner, who has one share there too."""
    name = account.name.removeprefix(NAMED_PREFIX).strip()
    return f"{account.owner}{PART_OF}{name}"[:_ACCOUNT_CHARS]


@lru_cache(4096)
def _digest(*parts: str) -> str:
    return blake2b("\0".join(parts).encode(errors="replace"), digest_size=16).hexdigest()
