"""An embedding that stays packed on the CPU, and is the head too, is one matrix that kernels read."""

from dataclasses import dataclass

import pytest
import torch

from mgpu.protocol.checkpoint.quantized.gguf import GGUF_FORMATS
from mgpu.worker.kernels.cpu.tiles import TiledWeight, has_kernels
from mgpu.worker.layers.vocab import VocabParallel
from mgpu.worker.quantization.packing import PackedWeight, dequantize
from mgpu.worker.ranks.collectives import SingleRank

CPU, VOCABULARY, WIDTH = torch.device("cpu"), 83, 128
needs_kernels = pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")


@dataclass
class Rank(SingleRank):
    """One of two ranks: the second has a row of padding."""

    rank: int = 0
    size: int = 2


def packed_vocab(group: SingleRank, dtype: torch.dtype) -> tuple[VocabParallel, PackedWeight]:
    """Return a matrix and its rows before they are repacked."""
    vocab = VocabParallel(VOCABULARY, WIDTH, group, dtype, CPU, form=GGUF_FORMATS["Q8_0"])
    vocab.init_dummy(torch.Generator().manual_seed(1))
    weight = vocab.packed
    assert isinstance(weight, PackedWeight)
    vocab.finalize_head(is_embedding_too=True)
    return vocab, weight


@needs_kernels
@pytest.mark.parametrize("rank", [0, 1])
def test_rows_are_looked_up_in_the_tiles_that_the_head_multiplies_by(rank: int) -> None:
    vocab, weight = packed_vocab(Rank(rank), torch.bfloat16)
    assert isinstance(vocab.packed, TiledWeight)
    dense = dequantize(weight, torch.float32)
    tokens = torch.tensor([3, 40, 41, 79])
    mine = [int(token) - vocab.start for token in tokens]
    expected = torch.stack([dense[each] if 0 <= each < len(dense) else torch.zeros(WIDTH) for each in mine])
    assert torch.equal(vocab._look_up_own(tokens), expected.to(torch.bfloat16))
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    logits, exact = vocab.logits(x)[:, : vocab.num_valid], (x.float() @ dense.T)[:, : vocab.num_valid]
    torch.testing.assert_close(logits.float(), exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))
    assert (vocab.logits(x)[:, vocab.num_valid :] == -torch.inf).all()
    assert vocab.weight_bytes() == pytest.approx(weight.nbytes, rel=0.2)  # the last tile is not full


def test_in_float32_rows_stay_as_the_file_has_them() -> None:
    vocab, weight = packed_vocab(SingleRank(), torch.float32)
    assert vocab.packed is weight
