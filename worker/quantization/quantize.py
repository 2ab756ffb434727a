"""Turn dense weights into `PackedWeight`, a few output channels at a time.

int8: symmetric, one scale per output channel, the largest value at 127.
fp8: e4m3 with one scale per matrix, since floats hold small channels as well as large ones: the least power of two that
puts no value above 448. So slices have the values of the whole, but for those that are subnormal there.
int4: a scale and an offset per group of inputs. Each end of a group's range is clipped by several amounts, scale and
offset are refitted by least squares to the integers that each gives, and those of least squared error are kept.
"""

# N output channels, K input channels, G groups of an output, M groups of a chunk, E inputs of a group

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.quantization import WeightFormat
from mgpu.worker.quantization.packing import PackedWeight, pack_fp8, pack_int4, pack_int8

_CLIPS = tuple((0.045 * below, 0.045 * above) for below in range(3) for above in range(3 - below))
"""Parts of a group's range that are clipped below and above. Ten (steps of 0.04, up to three) take a quarter more time
for 0.4 % of the error of normal weights; five (without that of no clip) save a tenth and err by 1 to 2 % more."""
_REFITS = 2
_TICKS = 8192.0
"""Steps that a group's range is divided into: integers whose sums of products with q are exact in float32."""
_FP8_LEAST = 2.0**-110
"""Least value that the largest of an fp8 matrix counts as, so that its scale has an inverse."""
_CHUNK_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 24}
"""Weights that are quantized at once. On the CPU a chunk is too small for torch to split: each thread does its own
chunks, and none waits for another in each of a hundred short operations. On a GPU large chunks mean few launches."""


def quantize(weight_NK: Tensor, form: WeightFormat) -> PackedWeight:
    """Quantize and pack a dense weight; temporary memory is a few copies of a chunk of rows per thread."""
    n, k = weight_NK.shape
    rows = max(1, _CHUNK_ELEMENTS[weight_NK.device.type] // k)
    most = _largest(weight_NK) if form.quant == "fp8" else None
    first = _quantize_rows(weight_NK[:rows], form, most)
    words = first.words.new_empty((n, first.words.shape[1]))
    scales = first.scales.new_empty((n, first.scales.shape[1]))

    @torch.inference_mode()  # threads do not inherit it
    def fill(top: int) -> None:
        piece = _quantize_rows(weight_NK[top : top + rows], form, most)
        words[top : top + rows] = piece.words
        scales[top : top + rows] = piece.scales

    if weight_NK.device.type == "cpu":
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, n, rows)))
    else:
        for top in range(0, n, rows):
            fill(top)
    return replace(first, words=words, scales=scales)


def _largest(weight_NK: Tensor) -> Tensor:
    """Return the largest absolute value, without a copy of the matrix."""
    low, high = weight_NK.aminmax()
    return torch.maximum(-low, high).float()


def _quantize_rows(weight_NK: Tensor, form: WeightFormat, most: Tensor | None) -> PackedWeight:
    """Quantize some rows of a matrix; for fp8, ``most`` is the largest value of the whole matrix."""
    weight_NK = weight_NK.float()
    if form.quant == "8":
        scales_N = _scales(weight_NK, 127.0)
        return pack_int8((weight_NK / scales_N[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales_N)
    if form.quant == "fp8":
        assert most is not None
        scale = _fp8_scale(most)
        return pack_fp8((weight_NK / scale).to(torch.float8_e4m3fn), scale.expand(len(weight_NK)))
    assert form.quant == "4", "a dense format has nothing to pack"
    return pack_int4(*search_int4(weight_NK, form.group), form.group)


def _fp8_scale(most: Tensor) -> Tensor:
    """Return the least power of two that puts ``most`` at 448 or below."""
    most = most.clamp(min=_FP8_LEAST)
    mantissa, _ = torch.frexp(most)  # 448 is 0.875 * 2^9
    return most * 2.0**-9 / mantissa * torch.where(mantissa > 0.875, 2.0, 1.0)


def _scales(weight_NK: Tensor, most: float) -> Tensor:
    """Return the scale of each output channel that puts its largest value at ``most``; 1 for a channel of zeros."""
    scales_N = weight_NK.abs().amax(dim=1) / most
    return torch.where(scales_N > 0, scales_N, 1.0)


def search_int4(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 values [N, K] in [-8, 7], scales and offsets [N, G] of small squared error, without calibration.

    Scales and offsets are float32 that bfloat16 holds exactly. Inputs missing from the last group count as copies of
    the last one. No group is worse than by the plain rounding of `_cover`.
    """
    n, k = weight_NK.shape
    groups = -(-k // group)
    padded_NK = F.pad(weight_NK, (0, groups * group - k), mode="replicate") if k % group else weight_NK
    # Groups are columns: every operation runs along contiguous memory, and none depends on a group's neighbours.
    w_EM = padded_NK.reshape(n * groups, group).T.contiguous()
    plain, best = (_round_stored(w_EM, *fit) for fit in (_cover(w_EM), _search(w_EM)))
    better_M = best.errors_M < plain.errors_M
    q_EM, scales_M, offsets_M, _ = (torch.where(better_M, *pair) for pair in zip(best, plain, strict=True))
    q_NK = q_EM.T.to(torch.int8).reshape(n, -1)[:, :k]
    return q_NK, scales_M.view(n, groups), offsets_M.view(n, groups)


def _cover(w_EM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets of plain rounding: nothing is clipped, though the offset is stored as bfloat16."""
    low_M, high_M = w_EM.amin(0), w_EM.amax(0)
    offsets_M = _stored(low_M + (high_M - low_M) * (8 / 15))
    return torch.maximum((offsets_M - low_M) / 8, (high_M - offsets_M) / 7), offsets_M


def _search(w_EM: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales and offsets of least squared error among those tried, as float32."""
    low_M, high_M = w_EM.amin(0), w_EM.amax(0)
    range_M = torch.where(high_M > low_M, high_M - low_M, 1.0)
    u_EM = (w_EM - low_M).div_(range_M).mul_(_TICKS).round_()
    sums_M = u_EM.sum(0)
    most_M = scales_M = offsets_M = torch.full_like(sums_M, -1.0)
    for below, above in _CLIPS:
        scale = _TICKS * (1 - below - above) / 15
        offset = _TICKS * below + 8 * scale
        moments = _moments((u_EM * (1 / scale)).sub_(offset / scale).round_().clamp_(-8, 7), u_EM, sums_M)
        gains_M = moments.covariances_M.square().div_(moments.variances_M)
        better_M = gains_M > most_M
        most_M = torch.maximum(most_M, gains_M)
        scales_M, offsets_M = torch.where(better_M, scale, scales_M), torch.where(better_M, offset, offsets_M)
    for _ in range(_REFITS):
        moments = _moments(_round(u_EM, scales_M, offsets_M), u_EM, sums_M)
        scales_M = moments.covariances_M / moments.variances_M
        offsets_M = (sums_M - scales_M * moments.q_sums_M) / len(u_EM)
    ticks_M = range_M / _TICKS
    return scales_M * ticks_M, low_M + offsets_M * ticks_M


class Moments(NamedTuple):
    """Sums that give the least squares: the scale is covariance / variance, the error falls by covariance^2 / variance.

    All summands are small integers, so float32 adds them exactly in any order. torch's order depends on the place of a
    group in its chunk, and slices must quantize to the same values as the whole.
    """

    q_sums_M: Tensor
    covariances_M: Tensor
    variances_M: Tensor


def _moments(q_EM: Tensor, u_EM: Tensor, sums_M: Tensor) -> Moments:
    q_sums_M = q_EM.sum(0)
    means_M = q_sums_M / len(q_EM)
    covariances_M = (q_EM * u_EM).sum(0).sub_(means_M * sums_M)
    variances_M = q_EM.square().sum(0).sub_(means_M * q_sums_M)
    return Moments(q_sums_M, covariances_M, variances_M.clamp_(min=1e-3))  # more, where integers differ


class Rounded(NamedTuple):
    q_EM: Tensor
    scales_M: Tensor
    offsets_M: Tensor
    errors_M: Tensor
    """Squared errors. Infinite for weights past 1e18, which then get the plain rounding."""


def _round_stored(w_EM: Tensor, scales_M: Tensor, offsets_M: Tensor) -> Rounded:
    """Round to the grid of scales and offsets as they are stored."""
    scales_M, offsets_M = _stored(scales_M), _stored(offsets_M)
    q_EM = _round(w_EM, scales_M, offsets_M)
    return Rounded(q_EM, scales_M, offsets_M, _sum((q_EM * scales_M).add_(offsets_M).sub_(w_EM).square_()))


def _stored(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).float()


def _round(w_EM: Tensor, scales_M: Tensor, offsets_M: Tensor) -> Tensor:
    """Round to integers in [-8, 7]; all are 0 where the scale is, or is so small that it has no inverse."""
    inverse_M = torch.where(scales_M < torch.finfo(torch.float32).tiny, 0.0, 1 / scales_M)
    return (w_EM - offsets_M).mul_(inverse_M).round_().clamp_(-8, 7)


def _sum(values_EM: Tensor) -> Tensor:
    """Add up each group in the same order wherever in a chunk it is."""
    while len(values_EM) > 1:
        low_EM, high_EM = values_EM.chunk(2)
        values_EM = low_EM + high_EM
    return values_EM[0]
