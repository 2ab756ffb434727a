"""The file of what was typed: private, bounded, and never a reason to fail."""

import os
from pathlib import Path

import pytest

from mgpu.launch.chat import history
from mgpu.launch.chat.history import History, history_file


def test_entries_come_back_in_their_order_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "chat_history"
    for text in ("one", "two\nlines", "dr\u00fc\u2028ben", "\ud800"):
        History(file).add(text)
    assert History(file).entries() == ["one", "two\nlines", "dr\u00fc\u2028ben", "\ud800"]


def test_the_file_and_its_folder_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        History(tmp_path / "mgpu" / "chat_history").add("secret")
        (tmp_path / "loose").touch(0o666)
        History(tmp_path / "loose").add("secret")
    finally:
        os.umask(before)
    assert (tmp_path / "mgpu").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "mgpu" / "chat_history").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "loose").stat().st_mode & 0o777 == 0o600


def test_a_long_file_is_shortened_and_long_messages_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MAX_ENTRIES", 3)
    file = tmp_path / "chat_history"
    for number in range(7):
        History(file).add(str(number))
    History(file).add("x" * (history.MAX_ENTRY_CHARS + 1))
    assert History(file).entries() == ["4", "5", "6"]
    assert file.read_text().splitlines() == ['"4"', '"5"', '"6"']
    assert [path.name for path in tmp_path.iterdir()] == ["chat_history"]


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"not json\n", b"[1]\n{}\n", b"\0\n"])
def test_damaged_lines_are_skipped(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "chat_history"
    file.write_bytes(content + b'"good"\n')
    assert History(file).entries() == ["good"]


def test_a_place_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    history = History(Path("/dev/null/mgpu/chat_history"))
    history.add("x")
    assert history.entries() == []
    assert History(tmp_path).entries() == [], "a folder"
    History(tmp_path).add("x")


def test_the_place_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    assert history_file({"XDG_STATE_HOME": "/state"}) == Path("/state/mgpu/chat_history")
    monkeypatch.setenv("HOME", "/home/me")
    for state in ("", "relative"):
        assert history_file({"XDG_STATE_HOME": state}) == Path("/home/me/.local/state/mgpu/chat_history")
