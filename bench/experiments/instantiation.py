"""The same graph instantiated in several ways, before and after twelve streams were used: `flags`, `eager`, `late`."""

import sys, os, ctypes

sys.path.insert(0, "bench/experiments")
sys.path.insert(0, "bench")
import torch
from decode_chain import *
import early_edges as E

cu = E.cu
V = ctypes.c_void_p
dev = torch.device("cuda:0")
tag = sys.argv[1]


def timed(launch, n=8, k=3):
    ts = []
    for _ in range(k):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        [launch() for _ in range(n)]
        b.record()
        b.synchronize()
        ts.append(a.elapsed_time(b) * 1e3 / n)
    return round(sorted(ts)[k // 2])


chain = DecodeChain(dev, 64, 160, 32)
z = torch.zeros(1000, device=dev)
keep = []


def cap(rows, early=False):
    chain.step(rows)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(g):
        chain.step(rows)
    if early:
        E.early(g.raw_cuda_graph())
    g.instantiate()
    keep.append(g)
    return g


def inst(g, flags):
    x = V()
    r = cu.cuGraphInstantiateWithFlags(ctypes.byref(x), V(g.raw_cuda_graph()), ctypes.c_ulonglong(flags))
    if r:
        print("flags", flags, "error", r)
        return None
    if flags & 4:
        print("upload", cu.cuGraphUpload(x, V(torch.cuda.current_stream().cuda_stream)))
    return x


def go(x):
    def f():
        r = cu.cuGraphLaunch(x, V(torch.cuda.current_stream().cuda_stream))
        assert r == 0, r

    return f


g = cap(8)
W = {"torch": g.replay}
if tag == "flags":
    for fl in (0, 4, 8):
        x = inst(g, fl)
        if x:
            W[f"flags {fl}"] = go(x)
if tag == "late":
    e = cap(8, True)
    W["early edges"] = e.replay


def show(what):
    torch.cuda.synchronize()
    line = {k: timed(f) for k, f in W.items()}
    hi = torch.cuda.Stream(priority=-5)
    with torch.cuda.stream(hi):
        line["high"] = timed(g.replay)
    print(tag, what, line, flush=True)


show("fresh")
S = [torch.cuda.Stream() for _ in range(12)]
for q in S:
    with torch.cuda.stream(q):
        z.zero_()
show("12 streams")
if tag == "flags":
    for fl in (0, 4):
        x = inst(g, fl)
        if x:
            W[f"flags {fl} later"] = go(x)
show("again")
n = cap(8)
W["new"] = n.replay
show("new graph")
more = [cap(r) for r in (2, 4, 16, 32)]
show("4 more graphs")
more += [cap(r) for r in (1, 3, 5, 6, 7, 9, 10)]
show("7 more graphs")
del keep[:]
del more
show("fewer graphs")
