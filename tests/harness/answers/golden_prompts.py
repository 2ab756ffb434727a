"""The reference outputs of the real models."""

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> list[dict[str, Any]]:
    """Return the golden prompts of a model, each with prompt, prompt_ids, output_ids and output_logprobs."""
    prompts: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())["prompts"]
    return prompts
