"""Try the kernels over peer memory before a server relies on them: wrong sums would look like answers."""

# T tokens, D model dim

import torch
from torch import Tensor

from mgpu.worker.ranks.peer_group import PeerGroup

_ROUNDS = 3
"""Each kind of message alternates between two halves of its area: the third round reuses the half of the first."""
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_FLOAT8_ROWS = 3
_INPUTS = 2048
"""Of a product that is tried: its kernels are those of most models' widths."""
_EPS = 1e-5


@torch.inference_mode()
def peer_problem(group: PeerGroup, device: torch.device) -> str:
    """Return what is wrong; empty if sums, norms and choices are as expected. All ranks of the group call this."""
    try:
        for turn in range(_ROUNDS):
            for rows in _row_counts(group):
                if problem := _check_sums(group, turn, rows, device):
                    return problem
            if problem := _check_product(group, turn, device):
                return problem
            if not torch.equal(*_choices(group, turn, device)):
                return "ranks would choose other tokens"
    except Exception as error:  # a compiler's or driver's failure may be of any type; the other group still serves
        return f"the kernels failed: {type(error).__name__}: {error}"
    return "a rank waited in vain" if group.has_failed else ""


@torch.inference_mode()
def launch_checks(group: PeerGroup, device: torch.device, in_float8: bool) -> None:
    """Launch what the trials launch, so that it is compiled; results are undefined."""
    for rows in _row_counts(group):
        _check_sums(group, 0, rows, device)
    _check_product(group, 0, device)
    _choices(group, 0, device)
    if in_float8:
        float8_problem(group, device)


def _row_counts(group: PeerGroup) -> list[int]:
    """Return sizes of messages that go in one shot, then in two."""
    one = group.one_shot.rows
    return sorted({1, min(5, one), one, min(one + 1, group.most_rows), group.most_rows})


def _check_sums(group: PeerGroup, turn: int, rows: int, device: torch.device) -> str:
    dim, dtype = group.limits.dim, group.limits.dtype

    def draw(seed: int, *sizes: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(1000 * turn + seed)
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    parts = [draw(10 + rank, rows, dim) for rank in range(group.size)]
    total_TD = torch.stack(parts).float().sum(0)
    stream_TD, weight_D = draw(1, rows, dim), draw(2, dim)
    x_TD = stream_TD.float() + total_TD
    normed_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight_D.float()
    fused_TD = group.add_and_norm(stream_TD, parts[group.rank].clone(), None, weight_D, _EPS)
    sum_TD = group.all_reduce(parts[group.rank])
    worst = max(
        _error(found, wanted) for found, wanted in ((sum_TD, total_TD), (stream_TD, x_TD), (fused_TD, normed_TD))
    )
    return "" if worst <= _TOLERANCE[dtype] else f"sums of {rows} rows are off by {worst:.1e} of their norm"


def _check_product(group: PeerGroup, turn: int, device: torch.device) -> str:
    """Return what is wrong with products of one row that are sent while they are computed."""
    dim, dtype = group.limits.dim, group.limits.dtype
    generator = torch.Generator(device).manual_seed(turn)
    *inputs, stream_1D, weight_1D = (
        torch.randn((1, size), generator=generator, device=device).to(dtype)
        for size in (*[_INPUTS] * group.size, dim, dim)
    )
    w_DK = torch.randn((dim, _INPUTS), generator=generator, device=device).to(dtype)
    if not group.takes_product(inputs[group.rank], w_DK):
        return ""
    total_1D = torch.stack([(x_1K.float() @ w_DK.float().T).to(dtype).float() for x_1K in inputs]).sum(0)
    x_1D = stream_1D.float() + total_1D
    wanted_1D = x_1D * (x_1D.square().mean(-1, keepdim=True) + _EPS).rsqrt() * weight_1D.float()
    group.send_product(inputs[group.rank], w_DK)
    normed_1D = group.add_sent_and_norm(stream_1D, None, weight_1D[0], _EPS)
    group.send_product(inputs[group.rank], w_DK)
    sum_1D = group.add_sent(None, device)
    worst = max(
        _error(found, wanted) for found, wanted in ((sum_1D, total_1D), (stream_1D, x_1D), (normed_1D, wanted_1D))
    )
    return "" if worst <= _TOLERANCE[dtype] else f"sums of sent products are off by {worst:.1e} of their norm"


@torch.inference_mode()
def float8_problem(group: PeerGroup, device: torch.device) -> str:
    """Return why norms within sums cannot be quantized; empty if they come out right. All ranks call this alike."""
    from mgpu.worker.kernels.layers.norm import add_rms_norm_float8

    dim, dtype = group.limits.dim, group.limits.dtype
    generator = torch.Generator(device).manual_seed(7)
    draws = torch.randn((group.size + 2, _FLOAT8_ROWS, dim), generator=generator, device=device).to(dtype)
    *parts, stream_TD, weights = draws
    total_TD = torch.stack(parts).float().sum(0).to(dtype)
    try:
        wanted = add_rms_norm_float8(stream_TD.clone(), total_TD, weights[0], _EPS)
        found = group.add_and_norm_float8(stream_TD.clone(), parts[group.rank].clone(), None, weights[0], _EPS)
        distance = _error(*(each.values.float() * each.scale_T[:, None] for each in (found, wanted)))
    except Exception as error:  # as above
        return f"the kernels failed: {type(error).__name__}: {error}"
    return "" if distance <= _TOLERANCE[dtype] else f"they are off by {distance:.1e} of their norm"


def _error(found_TD: Tensor, wanted_TD: Tensor) -> float:
    error = float((found_TD.float() - wanted_TD).norm() / wanted_TD.norm())
    return error if error == error else torch.inf


def _choices(group: PeerGroup, turn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what the ranks choose together, and what is right."""
    generator = torch.Generator(device).manual_seed(turn)
    scores_SR = torch.randint(-2, 2, (100, group.size), generator=generator, device=device).float()
    ids_SR = torch.arange(100 * group.size, dtype=torch.int32, device=device).view(group.size, 100).T.contiguous()
    scores_S, ids_S = (each[:, group.rank].contiguous() for each in (scores_SR, ids_SR))
    wanted_S = ids_SR.gather(1, scores_SR.argmax(1, keepdim=True))[:, 0]
    return group.exchange(scores_S, ids_S, 100 * group.size - 1), wanted_S
