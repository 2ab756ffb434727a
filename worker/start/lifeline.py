"""Begin as a child of the orchestrator and never outlive it.

Two ways to notice that the parent is gone: the kernel kills this process when the parent's thread ends
(PR_SET_PDEATHSIG), and standard input, which the parent keeps open, reaches its end.
"""

import os
import signal
import threading

from mgpu.protocol.internal.child import end_with_parent

EXIT_PARENT_GONE = 3


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends; call from the main thread, early."""
    parent = os.getppid()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(EXIT_PARENT_GONE)


def exit_when_stdin_ends() -> None:
    """Watch standard input from now on, in a thread, and leave at its end without any clean-up."""
    threading.Thread(target=_wait_for_end, name="stdin-watch", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass  # nothing is said after the spec
    os._exit(EXIT_PARENT_GONE)
