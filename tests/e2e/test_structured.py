"""Answers of a real and of a random model have the form that was asked for, by every way in."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

from bench.structured import check
from mgpu import Client
from mgpu.launch.server_process import ServerProcess

PAGE = (Path(__file__).parents[2] / "docs" / "structured.md").read_text(encoding="utf-8")


def run(server: ServerProcess, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::ResourceWarning", *command], env=server.environ, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_python_of_the_page_prints_answers_of_each_form(server: ServerProcess, endpoint: str) -> None:
    [source] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    done = run(server, "-c", source)
    assert (done.returncode, done.stderr) == (0, "")
    person, colour, date, total = done.stdout.splitlines()
    assert json.loads(person).keys() == {"name", "age"}
    assert colour in ("red", "green", "blue")
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){0,3}", total)


def test_generate_reads_a_schema_from_a_file(server: ServerProcess, endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text('{"enum": ["yes", "no"]}')
    command = ("-m", "mgpu.launch.cli", "generate", "Is the sky blue? ", "--json-schema")
    done = run(server, *command, str(file))
    assert (done.returncode, json.loads(done.stdout) in ("yes", "no")) == (0, True)
    file.write_text('{"properties": {"a": {"not": {}}}}')
    done = run(server, *command, str(file))
    assert (done.returncode, "at #/properties/a" in done.stderr, "Traceback" in done.stderr) == (69, True, False)


def test_answers_without_a_form_are_the_same_beside_those_with_one(endpoint: str) -> None:
    with Client(endpoint) as client:
        alone = client.generate("Once upon a time", max_tokens=5, ignore_eos=True)
        with client.stream("A number: ", regex="[0-9]{12}") as digits:
            first = next(digits)
            beside = client.generate("Once upon a time", max_tokens=5, ignore_eos=True)
            text = first.text + "".join(piece.text for piece in digits)
        assert beside.token_ids == alone.token_ids
        assert re.fullmatch("[0-9]{12}", text)


def test_answers_of_random_forms_are_valid(random_endpoint: str) -> None:
    pytest.importorskip("jsonschema")
    with Client(random_endpoint) as client:
        rows = check(client, 32, seed=3)
    assert [(row.faults, row.refused, row.first_fault) for row in rows] == [(0, 0, "")] * 2
    assert all(row.valid >= 8 for row in rows)
