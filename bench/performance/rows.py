"""The rows of `bench/performance`: one form for mgpu and for its peers, so that a table can be made of both.

A row says ``what`` was measured with how many requests (``count``) of which prompt ``length``, and gives the median of
its runs as ``value`` in ``unit``, beside the least and the greatest. What could not be measured has a ``note`` instead.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.model_shapes import SHAPES, SMALL_SHAPES, Config
from bench.options import Sizes, sizes
from mgpu.launch.bench.report import Row, spread

SHOWN = ("what", "count", "length", "value", "value_low", "value_high", "unit", "limit", "share")
BENCH = "performance"
DECODE, PREFILL, BURST, FIRST_TOKEN = "decode", "prefill", "burst", "first token"
READY, READY_COLD, READY_FILES = "ready", "ready, no compiled kernels", "ready, page cache"
READY_PEER, IDLE = "transformers ready, page cache", "idle"
GAP, OCCUPANCY, STEP, FAILED = "idle before a step", "busy", "decode step", "failed"
TOKENS_PER_S = "tok/s"
BURST_TOKENS = 256
"""How long every answer of a burst is."""


def row(what: str, count: int, length: int, unit: str, values: Sequence[float]) -> Row:
    """Make a row of its runs."""
    return {"what": what, "count": count, "length": length, "unit": unit, **spread("value", values)}


def missing(what: str, count: int, length: int, note: str) -> Row:
    """Make a row of what could not be measured."""
    return {"what": what, "count": count, "length": length, "note": note}


def last_line(text: str) -> str:
    """Return a program's last line: of a traceback, the error."""
    return text.strip().rpartition("\n")[2] or "nothing was said"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. A rehearsal keeps every name and divides what it stands for."""

    seconds: float
    """How long decoding is counted."""
    repeat: int
    fewer: int = 1
    """What numbers of requests and of tokens are divided by."""
    is_rehearsal: bool = False

    def size(self, asked: int) -> int:
        """Return the number of requests or tokens of this effort."""
        return max(1, asked // self.fewer)

    def config(self, shape: str) -> Config:
        """Return the model of a shape."""
        return (SMALL_SHAPES if self.is_rehearsal else SHAPES)[shape]


REAL = Effort(seconds=0.6, repeat=3)
REHEARSED = Effort(seconds=0.2, repeat=2, fewer=32, is_rehearsal=True)


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What a peer is to measure; numbers of requests with lengths of prompts."""

    shape: str
    device: str
    decode: Sizes
    prefill: Sizes
    first_token: Sizes
    burst: Sizes
    save: Path | None
    effort: Effort


def peer_options(doc: str) -> PeerOptions:
    """Read the command line of a peer."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8B", help="random weights of this shape")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    for name in ("decode", "prefill", "first-token", "burst"):
        parser.add_argument(f"--{name}", type=sizes, default=(), metavar="COUNTxLENGTH,…")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a small model and small numbers")
    options = vars(parser.parse_args())
    return PeerOptions(effort=REHEARSED if options.pop("rehearse") else REAL, **options)


def window_rates(arrivals: Sequence[tuple[float, int]], windows: int) -> list[float]:
    """Return tokens per second in each of so many equal numbers of arrivals; the first arrival only starts the clock.

    ValueError when there are too few for that.
    """
    width = (len(arrivals) - 1) // windows
    if width < 1:
        raise ValueError(f"{len(arrivals)} arrivals cannot be cut into {windows} windows")
    rates = []
    for start in range(0, width * windows, width):
        counted = arrivals[start + 1 : start + width + 1]
        rates.append(sum(tokens for _, tokens in counted) / (counted[-1][0] - arrivals[start][0]))
    return rates
