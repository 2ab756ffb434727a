"""`mgpu-launch chat` before its first prompt."""

import pytest
from click.testing import CliRunner

from mgpu.launch.commands.talk import chat


class ServerWithoutTemplate:
    """What `chat` asks of a client before the first prompt."""

    def __init__(self, *_: object, **options: object) -> None: ...

    def __enter__(self) -> "ServerWithoutTemplate":
        return self

    def __exit__(self, *_: object) -> None: ...

    def models(self) -> list[dict[str, object]]:
        return [{"name": "base", "chat": False}]


def test_a_model_that_cannot_chat_is_told_before_the_first_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "Client", ServerWithoutTemplate)
    done = CliRunner().invoke(chat.chat_command, input="/bye\n")
    assert done.exit_code == 0, done.output
    assert done.output.index("base has no chat template or no tokenizer") < done.output.index("> ")
