"""The model that is served: its text side, and what the engine has announced of itself."""

from dataclasses import dataclass

from mgpu.orchestrator.gateway.front.refusal import RETRY_AFTER_S, Refusal
from mgpu.orchestrator.gateway.text.tokenizer import TextCodec
from mgpu.protocol.front.client_messages import Generate
from mgpu.protocol.internal.gateway_messages import EngineInfo, GatewaySpec


@dataclass(slots=True)
class ServedModel:
    """One per gateway. ``info`` changes with the engine's state."""

    spec: GatewaySpec
    info: EngineInfo | None = None
    """None before the engine has announced itself."""
    codec: TextCodec | None = None
    """None when the model's folder has no tokenizer, and until it is loaded."""
    is_loaded: bool = False
    """The tokenizer is loaded, or there is none."""

    @property
    def public_info(self) -> EngineInfo:
        """The engine's state as clients see it: starting until the tokenizer is loaded too."""
        return self.info if self.info is not None and self.is_loaded else EngineInfo("starting", 0, 0, "")

    def check(self, request: Generate) -> None:
        """Raise Refusal if another model is asked for, or no requests are taken now."""
        name = self.spec.model_name
        if request.model is not None and request.model != name:
            text = f"model {request.model[:80]!r} is not served here; this server has {name!r}"
            raise Refusal("unknown_model", text)
        self.limits()

    def limits(self) -> EngineInfo:
        """Return the engine's limits. Refusal when it takes no requests: while it starts, drains or has stopped."""
        info = self.public_info
        if info.state == "starting":
            raise Refusal("not_ready", "the server is still loading the model", RETRY_AFTER_S)
        if info.state == "draining":
            raise Refusal("draining", "the server is finishing its last requests before it stops", RETRY_AFTER_S)
        if info.state == "stopped":
            raise Refusal("stopped", "the server has stopped")
        return info  # ready, or recovering: then the engine queues
