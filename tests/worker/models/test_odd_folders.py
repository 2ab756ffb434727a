"""Folders of odd but real shapes give the logits of transformers, or those that are stated."""

from pathlib import Path

import pytest
import torch

from harness.models.odd_folders import FOLDERS
from harness.models.odd_models import IDS, write_case
from harness.ranks.stage_driver import logits_in_chunks
from mgpu.protocol.checkpoint.read import read_checkpoint


@pytest.mark.parametrize("name", FOLDERS)
def test_an_odd_folder_is_computed_as_by_transformers(tmp_path: Path, name: str) -> None:
    folder, right = write_case(FOLDERS[name], tmp_path)
    logits = logits_in_chunks(read_checkpoint(folder), IDS, [7, 1, 12])
    torch.testing.assert_close(logits, right, atol=1e-4, rtol=0)
    assert right.std() > 0.05, "the model tells nothing apart"
