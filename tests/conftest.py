"""What every test process needs: importable helpers, and signals as a shell in the foreground hands them on."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IGNORED = "PYTEST_IGNORED_SIGNALS"
"""Names the ignored signals to the processes of pytest-xdist. A name in MGPU_ would be refused by `serve`."""

# Let every process that a test starts import `harness` and `bench`, as pytest itself does (see pyproject.toml).
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")))
)

# Tests start hundreds of Python processes. Containers often ask Python to keep no bytecode; then each process, and each
# run of pytest, would compile all sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Tests run side by side: a thread of torch that waits by spinning would take another test's core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Servers of tests run side by side: the default port of HTTP is for one of them only, and none needs it unless it asks.
os.environ.setdefault("MGPU_HTTP", "none")

# The type of servers on the CPU would be the processor's choice. In float32 the answers of tests are exact everywhere.
os.environ.setdefault("MGPU_DTYPE", "float32")


def ignore_without_inheritance() -> None:
    """Replace ignored signals by a handler that does nothing.

    nohup ignores SIGHUP, and a shell ignores SIGINT for a job in the background. A child would inherit that, so that
    tests which end a child by these signals would wait for ever. A handler is not inherited: `exec` resets it to the
    default. So this process still ignores the signals, and its children do not.
    """
    known = os.environ.get(IGNORED, "").split()
    for number in (signal.SIGINT, signal.SIGHUP):
        if number.name in known or signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
            os.environ[IGNORED] = f"{os.environ.get(IGNORED, '')} {number.name}"


ignore_without_inheritance()
