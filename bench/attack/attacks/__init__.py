"""What is tried against the front channel and over HTTP, by name.

Each attack goes on until its `Clock` says that the time is over.

An attacker's ``strength`` multiplies connections, or what one message holds. None of these needs more than what a
client that is let in has (on tcp, a key). Those before the handshake need not even that.
"""

from collections.abc import Callable

from bench.attack.attacks.clock import Clock
from bench.attack.attacks.connections import CONNECTIONS, idle_connections
from bench.attack.attacks.floods import FLOODS
from bench.attack.attacks.http import HTTP
from bench.attack.attacks.requests import REQUESTS, regular_expression
from bench.attack.peers import Attacker
from bench.attack.situations import FEW_DESCRIPTORS, LOST_TOKEN, ORDINARY, SLOW_EXPRESSION, WITH_HTTP, Situation

Attack = Callable[[Attacker, Clock], None]

ATTACKS: dict[str, Attack] = {
    attack.__name__.replace("_", "-"): attack for attack in (*CONNECTIONS, *REQUESTS, *FLOODS, *HTTP)
} | {
    "few-descriptors": idle_connections,
    "slow-expression": regular_expression,
    "lost-token": regular_expression,
}
_SITUATIONS = {"few-descriptors": FEW_DESCRIPTORS, "slow-expression": SLOW_EXPRESSION, "lost-token": LOST_TOKEN} | {
    attack.__name__.replace("_", "-"): WITH_HTTP for attack in HTTP
}


def situation_of(name: str) -> Situation:
    """Return the server that an attack needs; mostly an ordinary one."""
    return _SITUATIONS.get(name, ORDINARY)
