"""End with the process that started this one."""

import ctypes

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Ask the kernel for signal ``number`` when the thread that started this process ends. OSError if it refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
