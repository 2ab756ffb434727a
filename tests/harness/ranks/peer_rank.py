"""One rank of a test in the interpreter, on shared memory in place of peer GPUs: ``peer_rank RANK FD RANKS``.

Says ``empty`` once its areas are, and reads a line; then prints a digest of everything that it computed.
"""

import hashlib
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
import numpy
import torch

from harness.kernels.peer_checks import Rank, compare, region_bytes
from harness.kernels.triton_interpreter import mend_interpreter
from mgpu.worker.kernels.peers import host_shot
from mgpu.worker.kernels.peers.memory import PeerAlarm

mend_interpreter()
host_shot.MOST_PROGRAMS = 1  # so that a program has more rows than one

DTYPE = torch.bfloat16
LOOKS = 500_000


def main() -> None:
    rank, fd, ranks = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    nbytes = region_bytes(ranks, DTYPE)
    memory = torch.frombuffer(mmap.mmap(fd, ranks * nbytes), dtype=torch.uint8)
    addresses = [memory.data_ptr() + peer * nbytes for peer in range(ranks)]
    alarm = PeerAlarm(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), LOOKS)
    own = Rank(rank, ranks, DTYPE, memory[rank * nbytes :][:nbytes], addresses, alarm)
    print("empty", flush=True)
    sys.stdin.readline()
    with numpy.errstate(all="ignore"):
        found = own.launch()
    assert not int(alarm.seen), "waited in vain"
    compare(found, own.expected())
    digest = hashlib.sha256()
    for each in found:
        digest.update(each.view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main()
