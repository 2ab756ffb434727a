"""Keep apart what clients with different keys call by the same name, and refuse those whose key was taken away."""

from dataclasses import replace

from mgpu.orchestrator.gateway.front.access import KEY_PREFIX, Doorkeeper
from mgpu.orchestrator.gateway.requests.admission import Refusal
from mgpu.protocol.front.client_messages import ClientMessage, Generate, ResumeRequest


def owned(message: ClientMessage, identity: str) -> ClientMessage:
    """Make the session and the cache salt of a message the key's own.

    So nobody can resume what another key began, nor measure by the time of a first token which prompts others send.
    Without keys all clients are one user, or have nothing that tells them apart.
    """
    if not identity.startswith(KEY_PREFIX):
        return message
    if isinstance(message, Generate):
        session = message.session and f"{identity} {message.session}"
        return replace(message, session=session, cache_salt=f"{identity} {message.cache_salt}")
    if isinstance(message, ResumeRequest):
        return replace(message, session=f"{identity} {message.session}")
    return message


def check_allowed(identity: str, doorkeeper: Doorkeeper) -> None:
    """Refusal when the key of a connection was taken off the list after it was made."""
    if not doorkeeper.allows(identity):
        raise Refusal("not_allowed", "this client's key is no longer on the server's list")
