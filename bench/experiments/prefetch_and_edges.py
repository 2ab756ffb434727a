"""Gaps before kernels of cuBLAS: `late` (with late_trigger.patch), `pre`; `gemv` is with prefetch.patch."""

import sys, os, time

sys.path.insert(0, "bench")
sys.path.insert(0, "bench/experiments")
import torch, triton, triton.language as tl
from dataclasses import replace
from decode_chain import *
import decode_chain
from mgpu.worker.kernels import gemv as G, quantized_gemv as QG, runtime
from mgpu.worker.kernels.packing import PackedWeight
from mgpu.worker.kernels.runtime import launch_options, overlaps_launches, wait_for_inputs
import early_edges as E

dev = torch.device("cuda")


@triton.jit
def p_kernel(w_ptr, N, row_bytes, PRE: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    if PRE > 0:
        for r in range(tl.program_id(0) * 128, N, tl.num_programs(0) * 128):
            place = w_ptr.to(tl.pointer_type(tl.int8)) + (r + tl.arange(0, 128)).to(tl.int64) * row_bytes
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
                "=r,l,r",
                [place, tl.full([128], PRE, tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def pre(w, mb):
    n, k = w.shape
    per = int(mb * 2**20 / n) // 128 * 128
    rows = n
    while per < 256 and per and rows > 4096:
        rows //= 2
        per = int(mb * 2**20 / rows) // 128 * 128
    p_kernel[(32,)](w, rows, k * 2, per, True, num_warps=4, launch_pdl=True)


def time_graph(fn, early=False, n=20):
    fn()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(g):
        out = fn()
    ch = E.early(g.raw_cuda_graph()) if early else 0
    g.instantiate()
    for _ in range(3):
        g.replay()
    ts = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        g.replay()
        b.record()
        b.synchronize()
        ts.append(a.elapsed_time(b) * 1e3)
    ts.sort()
    return ts[n // 2], out.clone(), ch


mode = sys.argv[1]
chain = DecodeChain(dev, 64, 128, 32)


def step_pre(rows, mb):
    residual = chain.embedded[:rows].clone()
    x = rms_norm(residual, chain.norm, 1e-5)
    for layer, (q, o, gu, d) in enumerate(chain.layers):
        y = F.linear(x, q)
        if mb is not None:
            pre(o, mb)
        heads = chain.attention(y, layer)
        y = F.linear(heads, o)
        if mb is not None:
            pre(gu, mb)
        x = add_rms_norm(residual, y, chain.norm, 1e-5)
        y = F.linear(x, gu)
        if mb is not None:
            pre(d, mb)
        y = gated_activation(y, "silu")
        y = F.linear(y, d)
        if mb is not None:
            pre(chain.layers[(layer + 1) % 32][0], mb)
        x = add_rms_norm(residual, y, chain.norm, 1e-5)
    return sample(F.linear(x, chain.head))[1]


if mode == "late":
    for rows in (2, 8, 16, 32, 64):
        a, oa, _ = time_graph(lambda: step_pre(rows, None))
        b, ob, ch = time_graph(lambda: step_pre(rows, None), True)
        print(f"late rows {rows}: no edges {a:.0f}, {ch} early edges {b:.0f}, same {torch.equal(oa, ob)}", flush=True)
if mode == "pre":
    for rows in (2, 8, 16, 32, 64):
        a, _, _ = time_graph(lambda: step_pre(rows, None))
        line = f"pre rows {rows}: plain {a:.0f}"
        for mb in (0, 2, 4, 8, 12, 16, 24):
            line += f"; {mb} MB {time_graph(lambda: step_pre(rows, mb))[0]:.0f}"
        print(line, flush=True)
if mode == "gemv":
    names = ("qkv", "o", "gu", "d")

    def tilings(which):
        return {
            s: replace(
                G.choose_tiling(*((s[0] // 2, s[1], True) if n == "gu" else (s[0], s[1], False))), prefetch=n in which
            )
            for n, s in zip(names, decode_chain.SHAPES)
        }

    for which in ((), ("o",), ("o", "d"), ("o", "qkv"), ("qkv", "o", "d"), names):
        print(
            "bf16 prefetch",
            which,
            *(f"{time_graph(lambda: chain.step(1, tilings(which)))[0]:.0f}" for _ in range(2)),
            flush=True,
        )
    head = chain.head.clone()
    chain.layers = None
    torch.cuda.empty_cache()
    from mgpu.worker.kernels.quantized_gemv import quantized_gemv

    for kind in ("int8", "fp8", "int4"):
        layers = []
        for _ in range(32):
            l = []
            for n, k in decode_chain.SHAPES:
                words = torch.randint(
                    -(2**31), 2**31 - 1, (n, k // (8 if kind == "int4" else 4)), dtype=torch.int32, device=dev
                )
                if kind == "fp8":
                    words &= 0x3F3F3F3F
                sc = (
                    (torch.rand(n, 2 * k // 32, device=dev) * 0.01).to(torch.bfloat16).view(torch.int32)
                    if kind == "int4"
                    else torch.rand(n, 1, device=dev) * 0.01
                )
                l.append(PackedWeight(kind, words, sc, k, 32 if kind == "int4" else 0))
            layers.append(l)

        def qstep(which):
            def t(w, n):
                return replace(QG.choose_tiling(w), prefetch=n in which)

            residual = chain.embedded[:1].clone()
            x = rms_norm(residual, chain.norm, 1e-5)
            for i, (q, o, gu, d) in enumerate(layers):
                y = chain.attention(quantized_gemv(x, q, tiling=t(q, "qkv")), i)
                x = add_rms_norm(residual, quantized_gemv(y, o, tiling=t(o, "o")), chain.norm, 1e-5)
                y = quantized_gemv(x, gu, gate="silu", tiling=t(gu, "gu"))
                x = add_rms_norm(residual, quantized_gemv(y, d, tiling=t(d, "d")), chain.norm, 1e-5)
            return sample(G.gemv(x, head))[1]

        for which in ((), ("o",), ("o", "d"), ("o", "qkv"), ("qkv", "o", "d"), names):
            print(
                kind, "prefetch", which, *(f"{time_graph(lambda: qstep(which))[0]:.0f}" for _ in range(2)), flush=True
            )
        layers = None
