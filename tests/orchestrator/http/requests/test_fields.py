"""Fields of a body that are missing."""

import pytest

from mgpu.orchestrator.http.edge.errors import HttpError
from mgpu.orchestrator.http.requests.fields import parse_fields
from mgpu.orchestrator.http.routes.completions import RULES as COMPLETION_RULES


@pytest.mark.parametrize(("body", "said"), [
    ({"promt": "Once"}, "prompt is missing (the body has 'promt'); it must be"), ({}, "prompt is missing; it must be"),
    pytest.param({"x" * 100_000: 1}, "prompt is missing; it must be", id="long"),
    ({"text": "Once"}, "prompt is missing; it must be"),
])  # fmt: skip
def test_a_missing_field_is_named_with_what_was_typed_for_it(body: dict[str, object], said: str) -> None:
    with pytest.raises(HttpError) as caught:
        parse_fields(body, COMPLETION_RULES, "prompt")
    assert said in caught.value.message
