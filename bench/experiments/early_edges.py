"""Does a kernel of cuBLAS wait for its input where its edge lets it start ahead (`test`); what would that give (`steps`)?"""

import ctypes, sys, time

sys.path.insert(0, "bench")
import torch, triton, triton.language as tl
import torch.nn.functional as F

cu = ctypes.CDLL("libcuda.so.1")
V = ctypes.c_void_p


class Edge(ctypes.Structure):
    _fields_ = [
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("type", ctypes.c_ubyte),
        ("r", ctypes.c_ubyte * 5),
    ]


class KP(ctypes.Structure):
    _fields_ = [
        ("func", V),
        ("g", ctypes.c_uint * 3),
        ("b", ctypes.c_uint * 3),
        ("shm", ctypes.c_uint),
        ("params", V),
        ("extra", V),
        ("kern", V),
        ("ctx", V),
    ]


def ck(r, what=""):
    if r:
        raise RuntimeError(f"cuda {r} {what}")


def nodes(g):
    n = ctypes.c_size_t()
    ck(cu.cuGraphGetNodes(V(g), None, ctypes.byref(n)))
    a = (V * n.value)()
    ck(cu.cuGraphGetNodes(V(g), a, ctypes.byref(n)))
    return list(a)


def kind(n):
    t = ctypes.c_int()
    ck(cu.cuGraphNodeGetType(V(n), ctypes.byref(t)))
    return t.value


def name(n):
    if kind(n):
        return f"<type {kind(n)}>"
    p = KP()
    ck(cu.cuGraphKernelNodeGetParams_v2(V(n), ctypes.byref(p)), "params")
    s = ctypes.c_char_p()
    r = cu.cuFuncGetName(ctypes.byref(s), V(p.func)) if p.func else cu.cuKernelGetName(ctypes.byref(s), V(p.kern))
    if r:
        return f"<err {r}>"
    return s.value.decode()


def deps(n):
    c = ctypes.c_size_t()
    ck(cu.cuGraphNodeGetDependencies_v2(V(n), None, None, ctypes.byref(c)))
    if not c.value:
        return []
    a = (V * c.value)()
    e = (Edge * c.value)()
    ck(cu.cuGraphNodeGetDependencies_v2(V(n), a, e, ctypes.byref(c)))
    return [(a[i], e[i]) for i in range(c.value)]


def describe(g):
    from collections import Counter

    c = Counter()
    for n in nodes(g):
        d = deps(n)
        c[(name(n)[:60], tuple((e.type, e.from_port) for _, e in d))] += 1
    for k, v in c.most_common():
        print("  ", v, k)


def early(g, also=()):
    changed = 0
    for n in nodes(g):
        if kind(n):
            continue
        nm = name(n)
        if not (nm.startswith("nvjet") or any(a in nm for a in also)):
            continue
        d = deps(n)
        if len(d) != 1 or kind(d[0][0]) or d[0][1].type:
            continue
        f, t = (V * 1)(d[0][0]), (V * 1)(n)
        ck(cu.cuGraphRemoveDependencies_v2(V(g), f, t, ctypes.byref(d[0][1]), ctypes.c_size_t(1)), "rm")
        e = Edge()
        e.from_port = 1
        e.type = 1
        ck(cu.cuGraphAddDependencies_v2(V(g), f, t, ctypes.byref(e), ctypes.c_size_t(1)), "add")
        changed += 1
    return changed


@triton.jit
def slow(x, y, n, us, B: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    p = tl.program_id(0)
    t0 = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - t0 < us * 1000:
        pass
    for i in range(p * B, n, B * tl.num_programs(0)):
        o = i + tl.arange(0, B)
        tl.store(y + o, tl.load(x + o, mask=o < n), mask=o < n)


def test():
    torch.manual_seed(0)
    for rows in (2, 8, 16, 32, 64, 128, 192, 256):
        for o, i in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
            w = torch.randn(o, i, device="cuda", dtype=torch.bfloat16)
            src = torch.randn(rows, i, device="cuda", dtype=torch.bfloat16)
            x = torch.empty_like(src)
            ref = F.linear(src, w)

            def run():
                x.fill_(float("nan"))
                slow[(40,)](src, x, src.numel(), 60, 1024, num_warps=4, launch_pdl=True)
                return F.linear(x, w)

            run()
            torch.cuda.synchronize()
            g = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(g):
                y = run()
            n = early(g.raw_cuda_graph())
            g.instantiate()
            ok = True
            for _ in range(5):
                y.fill_(float("nan"))
                g.replay()
                torch.cuda.synchronize()
                ok &= bool(torch.equal(y, ref))
            names = [name(k)[:48] for k in nodes(g.raw_cuda_graph())]
            print(rows, (o, i), "changed", n, "ok" if ok else "WRONG", names[-2:], flush=True)
            del w


def steps():
    import step
    from mgpu.worker import graph_pool

    EARLY = [False]
    base = graph_pool.torch.cuda.CUDAGraph

    class G:
        def __init__(self):
            self.g = base(keep_graph=True)

        def capture_begin(self, **k):
            self.g.capture_begin(**k)

        def capture_end(self):
            self.g.capture_end()
            raw = self.g.raw_cuda_graph()
            if EARLY[0]:
                G.n = early(raw)
            G.last = raw
            self.g.instantiate()

        def replay(self):
            self.g.replay()

    outs = {}
    runners = {}
    torch.cuda.CUDAGraph = G
    r = step.make_runner(1152, "none", "auto")
    r.warm_up(16, 0)
    describe(G.last)
    for mode in (False, True):
        EARLY[0] = mode
        torch.manual_seed(0)
        if mode:
            r._graphs = (
                __import__("mgpu.worker.graphs", fromlist=["x"]).make_graphs(
                    r._stage, r._cache, r._rows, step.DryRun(step.SingleRank())
                )
                if hasattr(r, "_stage")
                else None
            )
        r.warm_up(16, 0)
        if mode:
            print("early edges", G.n)
            describe(G.last)
        for ctx in (128, 1024):
            for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                torch.manual_seed(1)
                step.fill(r, min(rows, 3), ctx)
                ms = step.fill(r, rows, ctx)
                step.decode(r, rows, ctx, 10)
                us = sorted(step.decode(r, rows, ctx + 10, 60)[0] for _ in range(3))
                tok = r._rows.tokens[:rows].clone()
                outs[mode, ctx, rows] = (us[1], ms, tok)
                if mode:
                    a = outs[False, ctx, rows]
                    print(
                        f"ctx {ctx} rows {rows}: step {a[0]:.0f} -> {us[1]:.0f} us ({(a[0] / us[1] - 1) * 100:+.1f}%), {rows / us[1] * 1e6:.0f} tok/s; prompt {a[1]:.2f} -> {ms:.2f} ms; same tokens {torch.equal(a[2], tok)}",
                        flush=True,
                    )


import os

if "test" in sys.argv:
    test()
if "steps" in sys.argv:
    steps()
