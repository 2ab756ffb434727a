"""The socket between a worker and the orchestrator: the worker's end."""

import zmq

from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.host_socket import use_host_options
from mgpu.protocol.internal.worker_messages import (
    CONTROL,
    AllocateCache,
    Joined,
    Shutdown,
    StaySpinning,
    StepPlan,
    Vocabulary,
)
from mgpu.protocol.keys import ClientKeys, public_of
from mgpu.worker.errors import BadPlan

_LINGER_MS = 2000
"""Time for the last message to leave, which may say why this worker ends."""

Order = AllocateCache | StepPlan | StaySpinning | Shutdown | Vocabulary


class ControlSocket:
    """A DEALER socket for one thread. It owns its context; `close` it."""

    def __init__(self, endpoint: str, epoch: int, joined: Joined | None = None) -> None:
        """``joined`` has the keys for an ``endpoint`` of tcp."""
        self._epoch = epoch
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.set_hwm(0)
        if joined is not None:
            keys = ClientKeys(joined.secret, public_of(joined.secret), joined.server_key)
            use_host_options(self._socket, joined.identity, keys)
        self._socket.connect(endpoint)

    def send(self, message: object) -> None:
        self._socket.send(CONTROL.encode(message))

    def receive(self, timeout_ms: int) -> Order | None:
        """Return the next order of this epoch, or None if none came in time. 0 looks without waiting.

        Orders of another epoch are dropped: they were meant for an earlier group. BadPlan for bytes that are no order.
        """
        while timeout_ms == 0 or self._socket.poll(timeout_ms):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            order = _decode(data)
            if order.epoch == self._epoch:
                return order
        return None

    def close(self) -> None:
        """Close the socket once its messages have left, after two seconds at most."""
        self._context.destroy(linger=_LINGER_MS)


def _decode(data: bytes) -> Order:
    try:
        message = CONTROL.decode(data)
    except CodecError as error:
        raise BadPlan(f"the orchestrator sent no message: {error}") from error
    if not isinstance(message, Order):
        raise BadPlan(f"the orchestrator sent a {type(message).__name__}, which only workers send")
    return message
