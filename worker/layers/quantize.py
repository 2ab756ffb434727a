"""Turn dense weights into `PackedWeight`, a few output channels at a time.

int8: symmetric, one scale per output channel, the largest value at 127.
fp8: e4m3 with one scale per output channel, the largest value at 448.
int4: one scale per group of inputs. Several clipping scales are tried for each group, each is then refitted by least
squares to the integers that it gave, and the one of least squared error is kept. The value of largest magnitude goes
to -8, which has no positive counterpart, so a scale may be negative.
"""

# N output channels, K input channels, G groups, E inputs of a group

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.quantization import WeightFormat
from mgpu.worker.kernels.packing import PackedWeight, pack_fp8, pack_int4, pack_int8

_CLIPS = (*(0.72 + 0.04 * step for step in range(10)), 8 / 7)
"""Scales that are tried, relative to the one that clips nothing; twice as many gain 0.1 %. The last is that of plain
rounding to nearest in [-7, 7], so that no group comes out worse than by that."""
_FP8_MOST = 448.0
_CHUNK_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 24}
"""Weights that are quantized at once. On the CPU torch splits nothing this small over threads: a thread does a chunk,
and none waits for another in each of a hundred short operations. On a GPU: few launches."""


def quantize(weight_NK: Tensor, form: WeightFormat) -> PackedWeight:
    """Quantize and pack a dense weight; temporary memory is a few copies of a chunk of rows per thread."""
    n, k = weight_NK.shape
    rows = max(1, _CHUNK_ELEMENTS[weight_NK.device.type] // k)
    first = _quantize_rows(weight_NK[:rows], form)
    words = first.words.new_empty((n, first.words.shape[1]))
    scales = first.scales.new_empty((first.scales.shape[0], n))

    @torch.inference_mode()  # threads do not inherit it
    def fill(top: int) -> None:
        piece = _quantize_rows(weight_NK[top : top + rows], form)
        words[top : top + rows] = piece.words
        scales[:, top : top + rows] = piece.scales

    if weight_NK.device.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, n, rows)))
    else:
        for top in range(0, n, rows):
            fill(top)
    return replace(first, words=words, scales=scales)


def _quantize_rows(weight_NK: Tensor, form: WeightFormat) -> PackedWeight:
    weight_NK = weight_NK.float()
    if form.quant == "8":
        scales_N = _scales(weight_NK, 127.0)
        return pack_int8((weight_NK / scales_N[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales_N)
    if form.quant == "fp8":
        scales_N = _scales(weight_NK, _FP8_MOST)
        # The division may round past 448, which e4m3 would turn into NaN.
        scaled_NK = (weight_NK / scales_N[:, None]).clamp_(-_FP8_MOST, _FP8_MOST)
        return pack_fp8(scaled_NK.to(torch.float8_e4m3fn), scales_N)
    assert form.quant == "4", "a dense format has nothing to pack"
    return pack_int4(*search_int4(weight_NK, form.group), form.group)


def _scales(weight_NK: Tensor, most: float) -> Tensor:
    """Give the scale of each output channel that puts its largest value at ``most``; 1 for a channel of zeros."""
    scales_N = weight_NK.abs().amax(dim=1) / most
    return torch.where(scales_N > 0, scales_N, 1.0)


def search_int4(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Give int8 values [N, K] in [-8, 7] and float32 scales [N, G] of small squared error, without calibration."""
    n, k = weight_NK.shape
    groups = -(-k // group)
    w_NGE = F.pad(weight_NK, (0, groups * group - k)).view(n, groups, group)
    full_NG1 = _signed_extreme(w_NGE) / -8
    best_NG1, most_NG1 = full_NG1, torch.full_like(full_NG1, -1.0)
    for clip in _CLIPS:
        q_NGE = _round(w_NGE, full_NG1 * clip)
        product_NG1, square_NG1 = (q_NGE * w_NGE).sum(2, keepdim=True), q_NGE.square().sum(2, keepdim=True)
        # With the scale product / square, the squared error is |w|^2 - product^2 / square.
        gain_NG1 = product_NG1.square() / square_NG1.clamp_(min=1.0)
        better_NG1 = gain_NG1 > most_NG1
        most_NG1 = torch.where(better_NG1, gain_NG1, most_NG1)
        best_NG1 = torch.where(better_NG1, product_NG1 / square_NG1, best_NG1)
    # A refitted scale may round some values better still; it never rounds them worse.
    q_NGE = _round(w_NGE, best_NG1)
    return q_NGE.view(n, -1)[:, :k].to(torch.int8), best_NG1.squeeze(2)


def _signed_extreme(w_NGE: Tensor) -> Tensor:
    """Give the value of largest magnitude of each group."""
    return w_NGE.gather(2, w_NGE.abs().argmax(2, keepdim=True))


def _round(w_NGE: Tensor, scales_NG1: Tensor) -> Tensor:
    """Round to integers in [-8, 7]; a group of zeros has scale 0 and stays zeros."""
    inverse_NG1 = torch.where(scales_NG1 == 0, 0.0, 1 / scales_NG1)
    return (w_NGE * inverse_NG1).round_().clamp_(-8, 7)
