"""Items of a conversation become the turns of a chat, and none is lost."""

from mgpu.orchestrator.http.requests.response_input import Input


def thought(text: str) -> dict[str, object]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def test_a_second_reasoning_item_does_not_replace_the_first() -> None:
    answer = {"role": "assistant", "content": "Yes."}
    turns = Input().parse("input", [thought("One."), thought("Two."), answer])
    assert turns == [
        {"role": "assistant", "content": "", "reasoning_content": "One."},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Two."},
    ]
