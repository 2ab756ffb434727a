"""Random weights of a quantized folder have the formats that its weights would have."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.models.quantized_folders import FORMATS, LATENTS, write_quantized
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.weight_format import HELD


@pytest.mark.parametrize(("name", "changes"), [*((name, {}) for name in FORMATS), ("fp8-blocks", LATENTS)])
def test_random_weights_have_the_formats_of_the_folder(tmp_path: Path, name: str, changes: dict[str, object]) -> None:
    quantized, _ = write_quantized(tmp_path, FORMATS[name], **changes)
    stored = read_checkpoint(quantized).facts.formats
    for file in quantized.glob("*.safetensors"):
        file.unlink()
    made = read_checkpoint(quantized, "dummy").facts.formats
    # How wide scales are stored follows from the weights alone.
    assert [[replace(getattr(each, held), scale_bytes=0) for held in HELD] for each in made] == [
        [replace(getattr(each, held), scale_bytes=0) for held in HELD] for each in stored
    ]
