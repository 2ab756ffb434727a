"""The commit that mgpu runs from, for people and for hosts that must run the same."""

import subprocess
from pathlib import Path

_GIT_S = 5.0


def commit_of(folder: Path) -> str:
    """Return the commit of the checkout that holds ``folder``, with + where files differ; empty without one."""
    place = folder.resolve()
    if not any((parent / ".git").exists() for parent in (place, *place.parents)):
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(place), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=_GIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: git does not answer"
    return done.stdout.strip() or "unknown: git does not answer"
