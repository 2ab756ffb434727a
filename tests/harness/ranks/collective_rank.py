"""One rank of a test of the collectives: ``collective_rank RANK FD CASE SIZES TRANSPORT FOLDER TIMEOUT``.

Prints ``ok`` and a digest of everything it received, or the name of the error that ended it.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from harness.specs import make_facts, make_spec
from mgpu.protocol.internal.worker_messages import WorkerSpec
from mgpu.protocol.model.placement import Transport
from mgpu.worker.errors import PeerLost
from mgpu.worker.ranks.links import Links, connect, layout_of

HIDDEN = 48
TOKENS = 6000  # one message of it is larger than a slot


FACTS = make_facts(q=4, kv=2, layers=4, hidden=HIDDEN, width=64, head_dim=12, vocab=100, context=64, tied=True)


def spec_of(sizes: list[int], transport: Transport, fd: int, folder: Path, timeout_s: float) -> WorkerSpec:
    spec = make_spec(
        FACTS, sizes, transport, epoch=1, rendezvous=f"file://{folder}/group", shared_fd=fd, max_rows=64,
        max_batch_tokens=TOKENS, worker_timeout_s=timeout_s,
    )  # fmt: skip
    return replace(spec, shared_bytes=layout_of(spec).total_bytes)


def values(rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return what a rank contributes in a turn; every rank can compute it for all ranks."""
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    if dtype is torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=dtype)
    return (torch.randn(shape, generator=generator) * 10).to(dtype)


def check_reduce(links: Links, digest: "hashlib._Hash") -> None:
    shapes: list[tuple[int, ...]] = [(1, HIDDEN), (7, HIDDEN), (TOKENS, HIDDEN), (3, 2, 5), (1,)]
    group = links.group
    for turn in range(30):
        shape = shapes[turn % len(shapes)]
        dtype = torch.bfloat16 if turn % 7 == 3 else torch.float32
        parts = [values(rank, turn, shape, dtype) for rank in range(group.size)]
        found = group.all_reduce(parts[group.rank].clone())
        exact = torch.stack(parts).double().sum(0)
        tolerance = 0.2 if dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=0.01)
        assert found.dtype is dtype
        digest.update(found.view(torch.uint8).numpy().tobytes())


def check_gather(links: Links, digest: "hashlib._Hash") -> None:
    group = links.group
    for turn, (shape, dtype) in enumerate(
        [((3, 5), torch.float32), ((4, 2), torch.int32), ((2, 3, 4), torch.bfloat16), ((40, 9000), torch.float32)]
    ):
        parts = [values(rank, turn, shape, dtype) for rank in range(group.size)]
        found = group.all_gather(parts[group.rank])
        assert torch.equal(found, torch.cat(parts, dim=-1))
        digest.update(found.contiguous().view(torch.uint8).numpy().tobytes())


def check_pipeline(links: Links, digest: "hashlib._Hash") -> None:
    """Pass activations down and tokens back, several steps ahead of the reader."""
    turns = range(9)
    for turn in turns:
        shape = (1 + turn % 4 * 1000, HIDDEN)
        if links.upstream is None:
            x = values(0, turn, shape, torch.float32)
        else:
            x = links.recv(*shape, torch.float32)
            assert torch.equal(x, values(0, turn, shape, torch.float32))
        links.send(x)
        x.zero_()  # a sent tensor is the sender's again
        links.send_tokens(torch.arange(turn + 1, dtype=torch.int32) * 3)
        if links.tokens_from is not None and turn >= 2:
            tokens = links.recv_tokens(turn - 1)
            assert tokens.tolist() == [3 * index for index in range(turn - 1)]
    digest.update(b"pipeline")


def main() -> None:
    rank, fd, case, sizes, transport, folder, timeout_s = sys.argv[1:]
    torch.set_num_threads(1)
    plan, shared_fd = [int(size) for size in sizes.split(",")], int(fd) if transport == "shared-memory" else -1
    spec = spec_of(plan, transport, shared_fd, Path(folder), float(timeout_s))
    links = connect(spec, int(rank), torch.device("cpu"))
    digest = hashlib.sha256()
    try:
        if case == "exchange":
            check_reduce(links, digest)
            check_gather(links, digest)
            check_pipeline(links, digest)
            links.close()
        elif rank == "1":
            if case == "failing":
                links.report_failure()
        elif links.downstream:
            for _ in range(8):
                links.send(torch.ones(1, HIDDEN))
        else:
            links.group.all_reduce(torch.ones(1, HIDDEN))
    except PeerLost as error:
        print(f"PeerLost {error}")
        return
    print(f"ok {digest.hexdigest()}")


if __name__ == "__main__":
    main()
