"""Rows of an embedding that is split over ranks."""

import pytest
import torch

from mgpu.worker.kernels.layers.embed import embed_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [24, 4096, 5120])
def test_a_rank_gives_its_own_rows_and_zeros_for_others(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    w_VD = torch.randn(10, dim, device=device).to(dtype)
    w_VD[8:] = torch.nan  # padding
    ids_T = torch.tensor([100, 107, 99, 108, 0, 103, 2**31], device=device)
    found_TD = embed_rows(ids_T, w_VD, 100, 8)
    zero_D = torch.zeros(dim, dtype=dtype, device=device)
    wanted_TD = torch.stack([w_VD[0], w_VD[7], zero_D, zero_D, zero_D, w_VD[3], zero_D])
    assert torch.equal(found_TD, wanted_TD)
