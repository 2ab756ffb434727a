"""A text that is continued without --max-tokens does not go on for ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mgpu.launch.commands.serve import serve_command
from mgpu.launch.commands.talk.generate import MOST_TOKENS, generate_command, stopped
from mgpu.orchestrator.errors import UserError
from mgpu.protocol.client.requests.results import Piece


def pieces(count: int, finish_reason: str | None = None) -> Iterator[Piece]:
    for number in range(1, count + 1):
        yield Piece(0, "ab", (1, 2), None, finish_reason if number == count else None, None)


def test_it_is_stopped_and_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(len(piece.token_ids) for piece in stopped(pieces(4 * MOST_TOKENS))) == MOST_TOKENS
    assert capsys.readouterr().err == " [stopped after 512 tokens; --max-tokens allows more]"


@pytest.mark.parametrize("count", [3, MOST_TOKENS // 2])
def test_what_ends_by_itself_is_given_whole(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(stopped(pieces(count, "stop"))) == list(pieces(count, "stop"))
    assert capsys.readouterr().err == ""


def test_a_prompt_without_quotes_is_refused_with_the_way_out() -> None:
    result = CliRunner().invoke(generate_command, ["Once", "upon", "a", "time"])
    assert result.exit_code == 2
    assert "4 words, but PROMPT is one: put it in quotes" in result.output


def test_a_prompt_that_is_not_utf8_is_refused_before_a_server_is_looked_for() -> None:
    result = CliRunner().invoke(generate_command, ["caf\udce9"])
    assert isinstance(result.exception, UserError)
    assert "PROMPT is no UTF-8 text at character 4" in str(result.exception)


def test_a_served_name_that_is_not_utf8_is_refused_before_the_model_is_read() -> None:
    result = CliRunner().invoke(serve_command, ["-m", "/nowhere", "--served-name", "caf\udce9"])
    assert isinstance(result.exception, UserError)
    assert "--served-name" in str(result.exception)


@pytest.mark.parametrize(("content", "error"), [
    (None, "No such file"), (b"", "the file is empty"), (b"\xff", "not a UTF-8 text"),
])  # fmt: skip
def test_a_schema_file_that_cannot_be_used_is_refused_before_a_server_is_looked_for(
    content: bytes | None, error: str, tmp_path: Path
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    result = CliRunner().invoke(generate_command, ["x", "--json-schema", str(file)])
    assert isinstance(result.exception, UserError)
    assert error in str(result.exception)
