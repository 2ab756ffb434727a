"""GGUF files of odd but real shapes give the logits that transformers computes with the stored numbers."""

from pathlib import Path

import pytest
import torch

from harness.models.odd_gguf import FILES, write_case
from harness.models.odd_models import IDS
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_computed_as_by_transformers(tmp_path: Path, name: str) -> None:
    file, right = write_case(FILES[name], tmp_path)
    logits = logits_in_chunks(read_checkpoint(file), IDS, [7, 1, 12])
    torch.testing.assert_close(logits, right, atol=2e-4, rtol=0)
    assert right.std() > 0.05, "the model tells nothing apart"
