"""Fuzz one target with atheris in this process: ``python -m bench.fuzz.worker NAME FOLDER CPU_SECONDS``.

It ends by itself, or by a signal when an input kills, hangs or swells the process: libFuzzer then leaves that input in
the folder. Exceptions are kept by kind, and it goes on. ``stats.json`` is rewritten as it goes.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mgpu", "jinja2"]):
    from bench.fuzz import corpus
    from bench.fuzz.target import Target, examine
    from bench.fuzz.targets import TARGETS

HANG_S = 60
MEMORY_MB = 3072


class Fuzzed:
    """One target, what was tried and what was found."""

    def __init__(self, target: Target, folder: Path, cpu_s: float) -> None:
        self._target, self._folder, self._cpu_s = target, folder, cpu_s
        self._inputs, self._kinds = 0, set[str]()
        self._began_s, self._next_stats_s = time.process_time(), 0.0

    def try_input(self, data: bytes) -> None:
        """Examine one input. Ends the process when the time is over."""
        self._inputs += 1
        finding = examine(self._target, data)
        if finding is not None and finding.kind not in self._kinds:
            self._kinds.add(finding.kind)
            name = hashlib.sha256(finding.kind.encode()).hexdigest()[:12]
            (self._folder / f"finding-{name}").write_bytes(data)
            (self._folder / f"finding-{name}.json").write_text(json.dumps({"kind": finding.kind, "text": finding.text}))
        now_s = time.process_time() - self._began_s
        if now_s >= self._next_stats_s or now_s >= self._cpu_s:
            self._next_stats_s = now_s + 1.0
            (self._folder / "stats.json").write_text(json.dumps({"inputs": self._inputs, "cpu_s": now_s}))
        if now_s >= self._cpu_s:
            sys.stderr.flush()
            os._exit(0)


def main() -> None:
    name, folder, cpu_s = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    target = TARGETS[name]
    inputs = folder / "inputs"
    if not inputs.exists():
        corpus.write_files([*corpus.load(name), *target.seeds()], inputs)
    words = folder / "words"
    words.write_text("# what the mutator may insert\n" + "".join(map(_line, target.words)))
    options = [
        f"-artifact_prefix={folder}/killer-",
        f"-max_len={target.longest}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        "-report_slow_units=1000",
    ]
    if target.words:
        options.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *options, str(inputs)], Fuzzed(target, folder, cpu_s).try_input)
    atheris.Fuzz()


def _line(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


if __name__ == "__main__":
    main()
