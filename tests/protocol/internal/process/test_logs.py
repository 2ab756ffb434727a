"""One form of log for all processes."""

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgpu.protocol.internal.process.logs import configure_logging, log_level


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which gets its handlers back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:], root.level = handlers, level


def logged(form: str, level: str = "info") -> list[str]:
    """Return the lines of one message with a traceback and one below the level."""
    stream = io.StringIO()
    logging.getLogger().handlers.clear()  # pytest's own
    configure_logging("gateway", stream, {"MGPU_LOG_FORMAT": form, "MGPU_LOG_LEVEL": level})
    log = logging.getLogger("mgpu.test")
    log.debug("quiet")
    try:
        raise ValueError("odd")
    except ValueError:
        log.error("failed with %d", 3, exc_info=True, extra={"fields": {"account": "uid:7"}})
    return stream.getvalue().splitlines()


def test_text_has_date_level_and_component(root: logging.Logger) -> None:
    first, *rest = logged("text")
    assert first[4] == first[7] == "-"
    assert first.endswith(" error gateway: failed with 3")
    assert rest[-1] == "ValueError: odd"


def test_json_is_one_object_per_line_with_the_fields_of_the_record(root: logging.Logger) -> None:
    [line] = logged("json")
    entry = json.loads(line)
    assert (entry["level"], entry["component"], entry["message"]) == ("error", "gateway", "failed with 3")
    assert entry["account"] == "uid:7"
    assert entry["time"].endswith("Z")
    assert "ValueError: odd" in entry["traceback"]


def test_every_line_for_the_journal_begins_with_its_priority(root: logging.Logger) -> None:
    lines = logged("journal")
    assert lines[0] == "<3>gateway: failed with 3"
    assert all(line.startswith("<3>") for line in lines)


def test_a_level_below_the_chosen_one_is_silent(root: logging.Logger) -> None:
    assert len(logged("json", "debug")) == 2


@pytest.mark.parametrize(("text", "level"), [("", logging.INFO), ("debug", logging.DEBUG), ("odd", logging.INFO)])
def test_the_level_comes_from_the_environment(text: str, level: int) -> None:
    assert log_level({"MGPU_LOG_LEVEL": text}) == level


@pytest.mark.parametrize(("matches", "begins"), [(True, "<6>gateway: hello"), (False, "2")])
def test_a_log_that_goes_to_the_journal_has_its_form(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, matches: bool, begins: str
) -> None:
    with (tmp_path / "log").open("w+") as file:
        monkeypatch.setattr("sys.stderr", file)
        status = os.fstat(file.fileno())
        logging.getLogger().handlers.clear()
        configure_logging("gateway", None, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + (not matches)}"})
        logging.getLogger("mgpu.test").info("hello")
        file.seek(0)
        assert file.read().startswith(begins)
