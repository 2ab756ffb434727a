"""The turns of a chat and the commands that change them, without a terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mgpu import DeadlineExceeded, MgpuError, Piece, RequestFailed, ServerUnreachable, Usage
from mgpu.launch.chat.answer import PlainScreen
from mgpu.launch.chat.conversation import Conversation, completions
from mgpu.launch.chat.settings import Settings


class FakeClient:
    """Answers each chat with the next of its answers: a text, an error, or a text and then an error."""

    def __init__(self, *answers: str | BaseException | tuple[str, BaseException]) -> None:
        self.asked: list[list[str]] = []
        self.options: list[dict[str, Any]] = []
        self._answers = list(answers)
        self.finish_reason = "stop"

    @contextmanager
    def stream_chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[Iterator[Piece]]:
        self.asked.append([turn["content"] for turn in messages])
        self.options.append(options)
        yield self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        given = self._answers.pop(0)
        text, error = given if isinstance(given, tuple) else (given, None)
        if isinstance(text, BaseException):
            text, error = "", text
        if text:
            yield Piece(0, text, (1, 2), None, None, None)
        if error is not None:
            raise error
        yield Piece(0, "", (), None, self.finish_reason, Usage(1, 2, 0))


def talk(client: FakeClient, *typed: str, system: str = "") -> FakeClient:
    lines = iter([*typed, None])
    Conversation(client, system, Settings({}), PlainScreen).run(lambda: next(lines))  # type: ignore[arg-type]
    return client


def test_turns_add_up_and_clear_starts_over() -> None:
    client = talk(FakeClient("A", "B", "C"), "one", "two", "/clear", "three", system="S")
    assert client.asked == [["S", "one"], ["S", "one", "A", "two"], ["S", "three"]]


def test_the_system_message_and_options_can_be_changed() -> None:
    client = talk(FakeClient("A", "B", "C"), "/system Be short.", "one", "/system", "/set seed 7", "two")
    assert client.asked == [["Be short.", "one"], ["one", "A", "two"]]
    assert client.options == [{}, {"seed": 7}]


@pytest.mark.parametrize("left", ["/bye", "/exit", "/quit", "/bye now"])
def test_the_user_leaves(left: str) -> None:
    assert talk(FakeClient(), left, "never").asked == []


def test_a_message_may_begin_with_a_slash_after_a_space_or_have_lines(capsys: pytest.CaptureFixture[str]) -> None:
    client = talk(FakeClient("A", "B"), "/etc/passwd", " /etc/passwd", "/one\ntwo", "  ")
    assert client.asked == [["/etc/passwd"], ["/etc/passwd", "A", "/one\ntwo"]]
    assert "/etc/passwd is no command, and was not sent" in capsys.readouterr().err


def test_retry_replaces_the_answer() -> None:
    client = talk(FakeClient("A", "B", "C"), "one", "/retry", "two")
    assert client.asked == [["one"], ["one"], ["one", "B", "two"]]


@pytest.mark.parametrize("failure", [RequestFailed("overloaded", "full"), KeyboardInterrupt()])
def test_a_retry_without_an_answer_keeps_the_one_before(failure: BaseException) -> None:
    client = talk(FakeClient("A", failure, "B", "C"), "one", "/retry", "two")
    assert client.asked[2] == ["one", "A", "two"]


def test_retry_asks_a_message_again_that_got_no_answer() -> None:
    client = talk(FakeClient("A", RequestFailed("overloaded", "full"), "B", "C"), "same", "same", "/retry", "next")
    assert client.asked[1:] == [["same", "A", "same"], ["same", "A", "same"], ["same", "A", "same", "B", "next"]]


def test_retry_has_nothing_to_ask_at_first_and_after_clear(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(FakeClient("A"), "/retry", "one", "/clear", "/retry").asked == [["one"]]
    assert capsys.readouterr().err.count("there is no message to answer again") == 2


def test_retry_says_when_the_answer_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    talk(FakeClient("A", "A"), "one", "/retry")
    assert "the same answer again; with /set temperature" in capsys.readouterr().err
    talk(FakeClient("A", "B"), "one", "/retry")
    assert "the same answer" not in capsys.readouterr().err


def test_a_part_of_an_answer_belongs_to_the_conversation() -> None:
    client = talk(FakeClient(("A", KeyboardInterrupt()), ("B", DeadlineExceeded("late")), "C"), "one", "two", "three")
    assert client.asked[2] == ["one", "A", "two", "B", "three"]


@pytest.mark.parametrize(
    "error", [RequestFailed("bad_request", "too long"), DeadlineExceeded("late"), ServerUnreachable("gone")]
)
def test_an_error_ends_the_answer_and_not_the_chat(error: MgpuError, capsys: pytest.CaptureFixture[str]) -> None:
    client = talk(FakeClient("A", error, "B"), "one", "two", "three")
    assert client.asked[2] == ["one", "A", "three"]
    told = capsys.readouterr().err
    assert f"error: {error}" in told
    assert "/clear starts over, /retry asks again" in told


@pytest.mark.parametrize("answers", [("A", ""), (RequestFailed("bad_request", "no"), "A")])
def test_starting_over_is_offered_only_after_an_error_within_a_conversation(
    answers: tuple[str | MgpuError, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    talk(FakeClient(*answers), "one", "two")
    assert "/clear" not in capsys.readouterr().err


def test_save_writes_the_conversation_again_and_again_but_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "talk.json", tmp_path / "other"
    other.write_text("mine")
    talk(FakeClient("Ä", "B"), "one", f"/save {file}", "two", f"/save {file}", f"/save {other}", "/save", system="S")
    assert [turn["content"] for turn in json.loads(file.read_text("utf-8"))] == ["S", "one", "Ä", "two", "B"]
    assert other.read_text() == "mine"
    told = capsys.readouterr().err
    assert f"wrote 5 messages to {file}" in told
    assert f"{other} exists; name another file" in told
    assert "type /save FILE" in told


@pytest.mark.parametrize("name", ["/dev/null/x", "/nowhere/x", "~nobody-of-that-name/x", "a\0b"])
def test_a_file_that_cannot_be_written_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    talk(FakeClient("A"), "one", f"/save {name}")
    assert "cannot write" in capsys.readouterr().err


def test_commands_and_options_are_completed() -> None:
    assert completions("/s") == ["/system ", "/set ", "/save "]
    assert completions("/set temp") == ["/set temperature "]
    assert "/bye" in completions("/")
    assert completions("s") == completions("") == []


def test_an_answer_that_was_cut_is_said_with_the_way_to_more(capsys: pytest.CaptureFixture[str]) -> None:
    talk(FakeClient("A"), "/set max_tokens 5", "one")
    assert "cut" not in capsys.readouterr().err
    client = FakeClient("A", "B")
    client.finish_reason = "length"
    talk(client, "/set max_tokens 5", "one", "/set max_tokens default", "two")
    told = capsys.readouterr().err
    assert "cut at max_tokens 5; /set max_tokens N allows more" in told
    assert "cut: the context is full; /clear starts over" in told


def test_too_many_max_tokens_are_answered_by_the_number_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = "9 prompt tokens and max_tokens 999 make 1008, but the context holds 128; use max_tokens 119 or less"
    refusal = RequestFailed("bad_request", text)
    talk(FakeClient(refusal, "A", refusal), "one", "two", "three")
    told = capsys.readouterr().err
    assert told.count("/set max_tokens 119 makes it fit") == 2
    assert "/retry" not in told
