"""The compiler that workers make their kernels for the CPU with. Where there is one, they hold more matrices packed."""

import os
import shutil

_NAMES = ("gcc", "cc")


def c_compiler() -> str | None:
    """Return the path of this machine's C compiler; None without one, or with MGPU_KERNELS=0."""
    if os.environ.get("MGPU_KERNELS", "1") == "0":
        return None
    return next(filter(None, map(shutil.which, _NAMES)), None)
