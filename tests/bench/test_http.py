"""The comparison of HTTP with the front channel, in a short form."""

import json
import subprocess
import sys
from pathlib import Path


def test_it_compares_speed_first_tokens_and_idle_connections(tmp_path: Path) -> None:
    short = ("--streams", "1,3", "--prompt-tokens", "4", "--new-tokens", "6", "--repeat", "2", "--first-tokens", "3")
    command = [sys.executable, "-m", "bench.http", "--shape", "tiny", *short, "--idle", "20", "--seconds", "0.2"]
    done = subprocess.run(
        [*command, "--save", str(tmp_path / "rows.json"), "--", "--device", "cpu"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["first token (quartiles)", "1 streams", "3 streams", "20 idle connections"]
    assert all(row["http"] > 0 for row in rows[:3]), done.stdout
