"""The start-up on the screen: progress while weights load, then a summary."""

import logging
import sys
import time
from collections.abc import Iterable, Mapping

from mgpu.orchestrator.config import ServerConfig
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.worker_messages import LoadProgress, Ready

log = logging.getLogger(__name__)

PLAIN_INTERVAL_S = 5.0
BAR_INTERVAL_S = 0.1
_BAR_WIDTH = 32


class ProgressBar:
    """One line for all ranks: redrawn in place on a terminal, a log line every few seconds elsewhere."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._on_terminal = sys.stderr.isatty()
        self._interval_s = BAR_INTERVAL_S if self._on_terminal else PLAIN_INTERVAL_S
        self._last_s = time.monotonic()
        self._drawn = False

    def show(self, progress: Iterable[LoadProgress]) -> None:
        """Draw the sum over ranks of the weights phase, not more often than anyone can read; clear it after that."""
        now = time.monotonic()
        if now - self._last_s < self._interval_s:
            return
        text = _progress_text([each for each in progress if each.phase == "weights"], self._world_size)
        if not text:
            self.close()
            return
        self._last_s = now
        if self._on_terminal:
            self._drawn = True
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()
        else:
            log.info("%s", text)

    def close(self) -> None:
        """Clear the line."""
        if self._drawn:
            self._drawn = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _progress_text(progress: list[LoadProgress], world_size: int) -> str:
    done, total = sum(each.done_bytes for each in progress), sum(each.total_bytes for each in progress)
    if not total:
        return ""
    share = done / total * len(progress) / world_size  # ranks that have not begun count as empty
    elapsed_s = max(each.elapsed_s for each in progress)
    speed = f", {format_bytes(int(done / elapsed_s))}/s" if elapsed_s > 0 else ""
    bar = "#" * int(share * _BAR_WIDTH)
    return f"loading [{bar:<{_BAR_WIDTH}}] {share:4.0%}  {format_bytes(done)} of {format_bytes(total)}{speed}"


def phase_seconds(ready: Iterable[Ready]) -> dict[str, float]:
    """Return the seconds of each phase on the slowest rank."""
    slowest: dict[str, float] = {}
    for each in ready:
        for phase, seconds in each.phase_s.items():
            slowest[phase] = max(slowest.get(phase, 0.0), seconds)
    return slowest


def ready_line(total_s: float, phases: dict[str, float], loaded_bytes: int) -> str:
    """Return the whole start-up in one line: seconds in all and per phase, bytes and speed of the weights."""
    return f"ready in {total_s:.1f} s  {_phases_text(phases, loaded_bytes)}"


def recovered_line(took_s: float, sequences: int, ready: Iterable[Ready]) -> str:
    """Return a recovery in one line: its seconds in all and per phase, and how many sequences go on."""
    each = list(ready)
    phases = phase_seconds(each)
    phases = {"spawn": max(0.0, took_s - sum(phases.values())), **phases}
    text = _phases_text(phases, sum(one.loaded_bytes for one in each))
    return f"recovered in {took_s:.2f} s with {counted(sequences, 'sequence')}  {text}"


def _phases_text(phases: dict[str, float], loaded_bytes: int) -> str:
    parts = []
    for phase, seconds in phases.items():
        part = f"{phase} {seconds:.1f}"
        if phase == "weights" and loaded_bytes and seconds > 0:
            part += f" ({format_bytes(loaded_bytes)}, {loaded_bytes / seconds / 1e9:.2f} GB/s)"
        parts.append(part)
    return f"[{' | '.join(parts)}]"


def format_bytes(count: int) -> str:
    """Write bytes in decimal units, as disks and transfer speeds are."""
    if count < 1_000_000_000:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.2f} GB"


def log_ready(config: ServerConfig, limits: Limits, ready: Mapping[int, Ready], total_s: float) -> None:
    """Log the workers' notes, where the time of the start went, the layout and the KV cache."""
    for rank in sorted(ready):
        for note in ready[rank].notes:
            log.info("worker %d: %s", rank, note)
    phases = phase_seconds(ready.values())
    spawn_s = max(0.0, total_s - sum(phases.values()))
    loaded_bytes = sum(each.loaded_bytes for each in ready.values())
    log.info("%s", ready_line(total_s, {"spawn": spawn_s, **phases}, loaded_bytes))
    log.info("%s", config.layout_table)
    log.info("sampling of requests that do not say: %s", config.sampling)
    if limits.max_seq_len < config.limits.max_seq_len:
        log.warning(
            "the KV cache holds %s tokens, so requests are limited to that instead of %s",
            f"{limits.kv_tokens:,}",
            f"{config.limits.max_seq_len:,}",
        )
    if f"{limits.kv_tokens:,} tokens" not in config.layout_table:  # the memory that was free differs from the plan's
        log.info(
            "KV cache allocated: %s tokens, %.1f requests at the full context of %s",
            f"{limits.kv_tokens:,}",
            limits.kv_tokens / limits.max_seq_len,
            f"{limits.max_seq_len:,}",
        )
