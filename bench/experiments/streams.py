"""The same graphs in a process that has used 0 to 16 streams."""

import sys

sys.path.insert(0, "bench/experiments")
sys.path.insert(0, "bench")
import torch
from decode_chain import *

dev = torch.device("cuda")


def t(g, n=12, k=3):
    ts = []
    for _ in range(k):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        [g.replay() for _ in range(n)]
        b.record()
        b.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / n)
    return round(sorted(ts)[k // 2])


chain = DecodeChain(dev, 64, 160, 32)
z = torch.zeros(1000, device=dev)


def cap(rows):
    chain.step(rows)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        chain.step(rows)
    return g


gs = [cap(r) for r in (1, 8, 64)]
S = [torch.cuda.Stream() for _ in range(16)]
for n in range(17):
    print(n, "side streams", [t(g) for g in gs], flush=True)
    if n < 16:
        with torch.cuda.stream(S[n]):
            z.zero_()
        torch.cuda.synchronize()
