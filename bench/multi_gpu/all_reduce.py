"""All-reduce latency by message size, backend and number of ranks; and which backend is the fastest where."""

from bench.all_reduce.__main__ import AllReduceTime, by_transport, time_all_reduce
from bench.all_reduce.rank import BACKENDS
from bench.multi_gpu.box import Box
from bench.multi_gpu.report import Report

SECTION = "all-reduce"
LENGTHS = [8192 << shift for shift in range(11)]
WANTED = {
    "gpus": tuple(name for name, backend in BACKENDS.items() if backend.transport == "nccl"),
    "shared": ("gloo", "shared-memory"),
    "cpu": ("shared-memory", "gloo"),
}
"""What is measured where."""
TARGET_US = {2: 5.0, 4: 6.0, 8: 8.0}
"""For the smallest message, by number of ranks, on H200."""


def run(box: Box, report: Report) -> None:
    """Measure what exists at every size of the group."""
    lengths = LENGTHS[::5] if report.rehearsal else LENGTHS
    for size in box.sizes[1:]:
        found: dict[str, list[AllReduceTime]] = {}
        for names in by_transport(WANTED[box.kind]):
            asked = f"{', '.join(names)}, {size} ranks"
            if report.has_time(SECTION, asked):
                with report.guard(SECTION, asked):
                    found |= time_all_reduce(box.machine, size, names, lengths)
        for name, times in found.items():
            _show(report, f"{name}, {size} ranks", times)
        if plain := {name: times for name, times in found.items() if not BACKENDS[name].is_fused}:
            _show_best(report, size, plain)


def _show(report: Report, asked: str, times: list[AllReduceTime]) -> None:
    for row in times:
        how = ", in a graph" if row.graph_us is not None else ""
        details = f"eager {row.eager_us:.1f} us"
        report.number(SECTION, f"{asked}, {row.nbytes >> 10} KiB{how}", row.best_us, "us", details=details)


def _show_best(report: Report, size: int, found: dict[str, list[AllReduceTime]]) -> None:
    """Hold the best backend against the target, and say from which message size on which one is the fastest."""
    by_length = {
        rows[0].nbytes: min(zip(found, rows, strict=True), key=lambda pair: pair[1].best_us)
        for rows in zip(*found.values(), strict=True)
    }
    length, (name, row) = next(iter(by_length.items()))
    report.number(SECTION, f"the fastest ({name}), {size} ranks, {length >> 10} KiB", row.best_us, "us",
                  most=TARGET_US[size])  # fmt: skip
    changes, last = [], ""
    for length, (name, _) in by_length.items():
        if name != last:
            changes.append(f"{name} from {length >> 10} KiB")
        last = name
    report.note(SECTION, f"the fastest by size, {size} ranks", ", ".join(changes))
