"""Rules for fields that have another form in HTTP."""

import pytest

from mgpu.orchestrator.http.requests.rules import Messages
from mgpu.protocol.front.fields import FieldError


@pytest.mark.parametrize("kind", [[], {}, [[]], 5, True, None, "image_url"])
def test_a_part_of_any_other_type_is_refused(kind: object) -> None:
    """A list or an object is no type either, and no set can look it up."""
    with pytest.raises(FieldError, match=r"messages\[0\]\.content\[0\]\.type is .*: this server takes text only"):
        Messages().parse("messages", [{"role": "user", "content": [{"type": kind, "text": "x"}]}])
