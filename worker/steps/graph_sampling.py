"""Choose tokens inside a CUDA graph: greedy or with noise, and of several ranks the best that any of them finds."""

# R rows of the padded batch, V tokens of this rank's slice

from torch import Tensor

from mgpu.worker.kernels.sample import sample
from mgpu.worker.ranks.peer_group import PeerGroup
from mgpu.worker.state.rows import RowTable


def choose(logits_RV: Tensor, rows_R: Tensor, positions_R: Tensor, rows: RowTable, peers: PeerGroup | None) -> Tensor:
    """Give tokens, int32 [R], and leave them in ``rows`` for the next step, but for rows whose position is 0."""
    slice_size = logits_RV.shape[1]
    scores_R, ids_R = sample(
        logits_RV,
        first_id=0 if peers is None else peers.rank * slice_size,
        rows_S=rows_R,
        positions_S=positions_R,
        temperatures=rows.temperatures,
        seeds=rows.seeds,
        tokens=rows.tokens if peers is None else None,
    )
    if peers is None:
        return ids_R
    last_id = peers.size * slice_size - 1
    return peers.exchange(scores_R, ids_R, last_id, rows_R, positions_R, rows.tokens)
