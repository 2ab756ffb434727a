"""Markdown of an answer: which part of it can be rendered already, and what the terminal gets."""

import io

import pytest
from rich.console import Console

from mgpu.launch.chat.markdown import markdown, split_blocks

ANSWER = """# Title

A paragraph
of two lines.

1. one

   more of one

2. two
- x
- y

```python
a = 1

b = 2
```

~~~
```

~~~
The end"""
BLOCKS = [
    "# Title\n\n", "A paragraph\nof two lines.\n\n", "1. one\n\n   more of one\n\n", "2. two\n- x\n- y\n\n",
    "```python\na = 1\n\nb = 2\n```\n\n", "~~~\n```\n\n~~~\nThe end",
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_blocks_are_the_same_however_the_answer_is_cut(size: int) -> None:
    done, pending = "", ""
    complete: list[str] = []
    for at in range(0, len(ANSWER), size):
        done, pending = split_blocks(pending + ANSWER[at : at + size])
        complete += [done] if done else []
    assert "".join([*complete, pending]) == ANSWER
    if size == 1:
        assert [*complete, pending] == BLOCKS


@pytest.mark.parametrize(("text", "pending"), [
    ("", ""), ("a\n\n", "a\n\n"), ("a\n\nb", "b"), ("```\na\n\nb", "```\na\n\nb"), ("````\n```\n\nb", "````\n```\n\nb"),
    ("```\n\na\n```\n\nb", "b"), ("- a\n\n  b", "- a\n\n  b"), ("a\n\n\n\nb", "b"),
    ("``` x\n\n``` y\n\nz", "``` x\n\n``` y\n\nz"),
])  # fmt: skip
def test_what_may_go_on_is_pending(text: str, pending: str) -> None:
    assert split_blocks(text) == (text[: len(text) - len(pending)], pending)


def rendered(text: str) -> str:
    file = io.StringIO()
    Console(file=file, width=60, force_terminal=False).print(markdown(text))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def test_nothing_of_the_text_is_lost() -> None:
    assert rendered("<think>\nlet me see\n</think> yes <b>no</b>") == "<think>\nlet me see\n</think> yes <b>no</b>"
    assert "https://example.org/x" in rendered("[click](https://example.org/x)")
    assert rendered("roses are red\nviolets are blue") == "roses are red\nviolets are blue"
    assert " 7 seven" in rendered("7. seven")
