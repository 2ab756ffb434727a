"""What a fuzz target is, and what counts as a finding: an unexpected exception, too much time, too much memory."""

import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """A function of hostile bytes, and the errors by which it may refuse them."""

    run: Callable[[bytes], object]
    expected: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]] = list
    """Inputs to begin with, beside those of the corpus."""
    words: tuple[bytes, ...] = ()
    """What a mutator may insert: keys, tags, magic numbers."""
    most_s: float = 1.0
    """CPU time of one input."""
    most_bytes: int = 256 << 20
    """By how much one input may raise the greatest memory of the process so far."""
    longest: int = 4096
    """Bytes of one input."""


@dataclass(frozen=True)
class Finding:
    """Why one input was not handled as it should be. Inputs with the same ``kind`` count as one finding."""

    kind: str
    text: str


def examine(target: Target, data: bytes) -> Finding | None:
    """Run one input; None if it was handled."""
    greatest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began_s = time.process_time()
    try:
        target.run(data)
    except target.expected:
        pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        return Finding(f"{type(error).__name__} at {_place(error)}", traceback.format_exc(limit=-12)[-3000:])
    took_s = time.process_time() - began_s
    if took_s > target.most_s:
        return Finding("slow", f"{took_s:.2f} s of CPU time, at most {target.most_s:g}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - greatest) * KIB
    if grown > target.most_bytes:
        return Finding("memory", f"{grown >> 20} MiB more memory, at most {target.most_bytes >> 20}")
    return None


def _place(error: BaseException) -> str:
    """Name the innermost line of this repository that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).resolve().is_relative_to(ROOT)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
