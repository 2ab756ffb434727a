"""The real gateway process, with messages that it dies of: those with a certain first token in ``prompt_ids``."""

import os
import sys

from mgpu.orchestrator.gateway.__main__ import main
from mgpu.orchestrator.gateway.clients import Clients
from mgpu.protocol.front.fields import int32_array

ABORT, SPIN = 66, 77
COMMAND = (sys.executable, "-m", "harness.servers.mortal_gateway")

_handle = Clients._handle


def _handle_or_die(self: Clients, received: object, data: dict[object, object]) -> None:
    ids = data.get("prompt_ids")
    first = int32_array(ids)[0] if isinstance(ids, bytes) and ids else 0
    if first == ABORT:
        os.abort()
    while first == SPIN:
        pass
    _handle(self, received, data)  # type: ignore[arg-type]


if __name__ == "__main__":
    Clients._handle = _handle_or_die  # type: ignore[method-assign]
    sys.exit(main())
