"""What was tried for cross-chunk attention, one layer of SmolLM2-135M's shape, forward and backward, interleaved; for 24_speed.  usage: python nbs/_kernels.py [--chunks 16] [--length 160] [--repeats 5]

Writes nbs/results/kernels.json: median seconds of each candidate, or why it does not run here."""
import argparse
import datetime
import functools
import json
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from revela_nb import attention
from revela_nb.attention import add_key_bias, cross_chunk_attention, cross_chunk_einsum, fold_queries, in_batch_weights

OUT = Path(__file__).resolve().parent / "results" / "kernels.json"
H, HKV, D = 9, 3, 64


class Sdpa:
    apply = staticmethod(attention.read_by_sdpa)


def by_sdpa(*args):
    before, attention.ReadByMatmul = attention.ReadByMatmul, Sdpa
    try: return cross_chunk_attention(*args)
    finally: attention.ReadByMatmul = before


def flex(compiled, query, key, value, weights, mask):
    "Every pair of chunks is a row of the batch; the key bias is a score modification."
    n, i, j = len(query), *weights.nonzero().T
    bias = (value.norm(dim=-1) + attention.EPS).log()[j]                                       # (P, Hkv, L)
    def score(s, b, h, q, k): return s + bias[b, h // (H // HKV), k]
    c = compiled(query[i], key[j], value[j] / value.norm(dim=-1, keepdim=True)[j], score_mod=score, enable_gqa=True)
    return torch.zeros_like(query).index_add(0, i, c * weights[i, j][:, None, None, None])


class Products(torch.autograd.Function):
    "The matrix products that any exact kernel with recomputation must make, and nothing else: a floor, not a result."
    @staticmethod
    def forward(ctx, query, key, value):
        n = len(query)
        q, k, v = query.reshape(n, HKV, -1, D), *(x.transpose(0, 1).contiguous().flatten(1, 2) for x in (key, value))
        ctx.save_for_backward(q, k, v)
        def work(readers):
            for h in range(HKV):
                for i, block in Products.blocks(q, k, readers): torch.mm(torch.mm(q[i, h], k[h, block].T), v[h, block])
        Products.share(work, q, k)
        return query.clone()

    @staticmethod
    def share(work, q, k): attention.share_out(work, ~torch.eye(len(q), dtype=torch.bool), q.shape[2] * k.shape[1] // len(q)) # threads as ours

    @staticmethod
    def blocks(q, k, readers):
        n, others = len(q), k.shape[1] // len(q) * (len(q) - 1)
        size = -(-(n - 1) // -(-(n - 1) * q.shape[2] * k.shape[1] // n // attention.BLOCK)) * k.shape[1] // n # blocks as ours
        return [(i, slice(at, min(at + size, others))) for i in readers for at in range(0, others, size)]

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        g = grad.reshape(q.shape)
        def work(readers):
            for h in range(HKV):
                for i, block in Products.blocks(q, k, readers):
                    p = torch.mm(q[i, h], k[h, block].T)
                    torch.mm(p.T, g[i, h]); torch.mm(g[i, h], v[h, block].T); torch.mm(p, k[h, block]); torch.mm(p.T, q[i, h])
        Products.share(work, q, k)
        return (None,) * 3


FLOOR = "its seven matrix products alone (a floor)"


def candidates():
    yield "einsum (authors)", cross_chunk_einsum
    yield FLOOR, lambda query, key, value, weights, mask: Products.apply(query, key, value)
    yield "matrix products (ours)", cross_chunk_attention
    yield "fused kernel, SDPA (ours, for GPUs)", by_sdpa
    yield "torch.compile of the einsum", torch.compile(cross_chunk_einsum)
    yield "torch.compile of the fused kernel", torch.compile(by_sdpa)
    yield "FlexAttention, compiled", functools.partial(flex, torch.compile(flex_attention))
    yield "FlexAttention, not compiled", functools.partial(flex, flex_attention)


def step(read, inputs, weights, mask, backward=True):
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    start = time.perf_counter()
    out = read(*leaves, weights, mask)
    if backward: out.sum().backward()
    return time.perf_counter() - start, out.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(args.chunks, h, args.length, D, generator=g) for h in (H, HKV, HKV)]
    weights, mask = in_batch_weights(torch.rand(args.chunks, args.chunks, generator=g), 1.0), torch.ones(args.chunks, args.length, dtype=torch.bool)
    rows, ready, exact = [], [], cross_chunk_einsum(*inputs, weights, mask)
    for name, read in candidates():
        row = {"name": name}
        rows.append(row)
        for backward in (True, False):
            try:
                first, out = step(read, inputs, weights, mask, backward)                        # compiles
                row |= {"backward": backward, "first": first} | ({} if name == FLOOR else {"error": (out - exact).abs().max().item()})
                ready.append((row, read, backward, []))
                break
            except Exception as fault: row["fault" if backward else "forward_fault"] = f"{type(fault).__name__}: {str(fault).strip().splitlines()[0][:160]}"
        print(row, flush=True)
    for _ in range(args.repeats):
        for row, read, backward, times in ready: times.append(step(read, inputs, weights, mask, backward)[0])
    for row, _, _, times in ready: row["seconds"] = statistics.median(times)
    report = {"chunks": args.chunks, "length": args.length, "repeats": args.repeats, "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(datetime.date.today()), "rows": rows}
    OUT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows: print(row)


if __name__ == "__main__": main()
