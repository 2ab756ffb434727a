"""What a gateway leaves with the engine so that another gateway, or connection, can continue a request."""

from dataclasses import dataclass, replace

from mgpu.orchestrator.gateway.requests.request import Request
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.front.server_messages import Accepted
from mgpu.protocol.internal.codec import Codec


@dataclass(frozen=True, slots=True)
class Context:
    """A request without its prompt and its choices."""

    spec: Generate
    accepted: Accepted
    deadline_s: float | None
    """CLOCK_MONOTONIC, the same for all processes of a machine."""
    identity: str
    client: str
    size: int

    def request(self, connection: bytes, owner: str, session: str, now_s: float) -> Request:
        """Return the request as it was admitted, for a connection of ``owner``."""
        spec, tokens = replace(self.spec, session=session), self.accepted.prompt_tokens
        whose = self.identity, owner, self.client
        return Request(connection, spec, now_s, self.deadline_s, *whose, prompt_tokens=tokens, size=self.size)


CONTEXT_CODEC = Codec(Context)


def without_input(spec: Generate) -> Generate:
    """Return a request without what only its admission needs, and what may be a megabyte."""
    spec = replace(spec, prompt=None, prompt_ids=None, messages=None, logit_bias=(), tools=None, documents=None)
    return replace(spec, template_options=None, emitted_ids=None, structured_outputs=None)


def pack_context(request: Request, accepted: Accepted) -> bytes:
    spec = replace(without_input(request.spec), session=None)
    return CONTEXT_CODEC.encode(
        Context(spec, accepted, request.deadline_s, request.identity, request.client, request.size)
    )
