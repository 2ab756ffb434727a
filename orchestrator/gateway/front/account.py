"""Whose limits and share of the server a request counts to.

Four words say who: a *connection* is the ROUTER's id of a peer; its *identity* is what the transport proved:
``key:FINGERPRINT`` (CURVE), ``uid:N`` (ipc), or nothing (tcp without keys); its *owner* is who is held responsible for
it: a key, else a process (``pid:N``, ipc), else an address; an *account* is whose limits and share a request counts to.

Owners share the server. A key is one account with all its connections. Without a key each connection is an account, and
so is each client that a peer names; all of these are parts of their owner's share. So nobody gains time by connecting
again, or by inventing names. Only the server's own HTTP process is believed: each client that it names, an API key or
an address, is an owner.

The kernel says which process has connected, and the socket keeps that for as long as the connection lasts. A process
that is forked is an owner of its own as soon as it connects. If the number of a dead process is given to a new one,
that one begins with what is left of the other's debt, a few milliseconds. Processes of other containers can have the
number 0: together they are one owner.
"""

from functools import lru_cache
from typing import NamedTuple

KEY_PREFIX = "key:"
NAMED_PREFIX = "client:"
"""Begins the name of a client whom a peer names, as the HTTP process does."""
HTTP_PREFIX = "http:"
"""Begins the name of a client whom the server's own HTTP process names."""
PART_OF = "/"
"""What follows it in a name is a part of what stands before it."""


class Account(NamedTuple):
    """Whose limits and share a request counts to."""

    owner: str
    name: str
    """Unique among those of the owner."""

    @property
    def path(self) -> tuple[str, ...]:
        """Return the names by which shares are divided, the owner first. The last is in the middle of no other path."""
        if self.name.startswith(NAMED_PREFIX):
            return self.owner, self.name.partition(PART_OF)[0], self.name
        return self.owner, self.name


@lru_cache(8192)
def account_of(identity: str, connection: bytes, owner: str, client: str = "") -> Account:
    """Return the account of a connection, or of the ``client`` that it has named."""
    if client.startswith(HTTP_PREFIX):
        name = NAMED_PREFIX + client.removeprefix(HTTP_PREFIX)
        return Account(name.partition(PART_OF)[0], name)
    if client:
        return Account(owner, client)
    return Account(owner, identity if identity.startswith(KEY_PREFIX) else f"{identity} {connection.hex()}")
