"""All-reduce latency by message size, backend and number of ranks; and which backend is the fastest where."""

from all_reduce import AllReduceTime, time_all_reduce
from all_reduce_rank import BACKENDS
from multi_gpu_box import Box
from multi_gpu_report import Report

SECTION = "all-reduce"
LENGTHS = [8192 << shift for shift in range(11)]
WANTED = {
    "gpus": ("nccl", "one-shot", "two-shot", "fused with residual + RMSNorm"),
    "shared": ("gloo", "shared-memory"),
    "cpu": ("shared-memory", "gloo"),
}
"""What should be measured where. Those that are not in `BACKENDS` do not exist yet, and the table says so."""
TARGET_US = {2: 5.0, 4: 6.0, 8: 8.0}
"""For the smallest message, by number of ranks, on H200."""


def run(box: Box, report: Report) -> None:
    """Measure what exists at every size of the group."""
    lengths = LENGTHS[::5] if report.rehearsal else LENGTHS
    for size in box.sizes[1:]:
        found: dict[str, list[AllReduceTime]] = {}
        for backend in WANTED[box.kind]:
            asked = f"{backend}, {size} ranks"
            if backend not in BACKENDS:
                report.skip(SECTION, asked, "no such all-reduce in worker/", "not built")
            elif report.has_time(SECTION, asked):
                with report.guard(SECTION, asked):
                    found[backend] = time_all_reduce(box.machine, size, backend, lengths)
                    _show(report, asked, found[backend])
        if found:
            _show_best(report, size, found)


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
