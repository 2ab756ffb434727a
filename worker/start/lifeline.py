"""Begin as a child of the orchestrator and never outlive it.

Two ways to notice that the parent is gone: the kernel kills this process when the parent's thread ends
(PR_SET_PDEATHSIG), and standard input, which the parent keeps open, reaches its end.
"""

import os
import signal
import struct
import threading

from mgpu.protocol.internal.child import end_with_parent
from mgpu.protocol.internal.codec import CodecError
from mgpu.protocol.internal.worker_messages import CONTROL, WorkerSpec
from mgpu.worker.errors import BadSpec

EXIT_PARENT_GONE = 3
_MAX_SPEC_BYTES = 16 << 20


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends; call from the main thread, early."""
    parent = os.getppid()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(EXIT_PARENT_GONE)


def read_spec_from_stdin() -> WorkerSpec:
    """Read one framed spec: 4 bytes of little-endian length, then the message. BadSpec for anything else."""
    (length,) = struct.unpack("<I", _read_exactly(4))
    if length > _MAX_SPEC_BYTES:
        raise BadSpec(f"standard input announces a spec of {length} bytes; the limit is {_MAX_SPEC_BYTES}")
    return decode_spec(_read_exactly(length))


def read_spec_from_file(path: str) -> WorkerSpec:
    """Read an unframed spec. BadSpec when the file cannot be read or holds something else."""
    try:
        with open(path, "rb") as file:
            return decode_spec(file.read(_MAX_SPEC_BYTES))
    except OSError as error:
        raise BadSpec(f"cannot read {path}: {error.strerror}") from error


def decode_spec(data: bytes) -> WorkerSpec:
    """Decode a spec. BadSpec when it is another message or none."""
    try:
        message = CONTROL.decode(data)
    except CodecError as error:
        raise BadSpec(f"not a worker spec: {error}") from error
    if not isinstance(message, WorkerSpec):
        raise BadSpec(f"expected a worker spec, got {type(message).__name__}")
    return message


def _read_exactly(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            raise BadSpec(
                f"standard input ended after {len(data)} of {count} bytes; workers are started by mgpu-launch, "
                "or by hand with --spec FILE"
            )
        data += piece
    return bytes(data)


def exit_when_stdin_ends() -> None:
    """Watch standard input from now on, in a thread, and leave at its end without any clean-up."""
    threading.Thread(target=_wait_for_end, name="stdin-watch", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass  # nothing is said after the spec
    os._exit(EXIT_PARENT_GONE)
