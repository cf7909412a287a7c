"""What attention and a whole step cost on a GPU, for 04c_streams and 24_speed.  usage: python nbs/_gpu.py [--out nbs/results/gpu.json] [--chunks 256 1024] [--seconds 170]

Exactness against float64, one layer by every way, tiles of the kernels, and the step of SmolLM2-135M's shape in bf16, eager and compiled. Written as it goes; what fails says why.
Without a GPU it rehearses on toy sizes."""
import argparse
import itertools
import json
import time
import traceback
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from revela_nb import attention
from revela_nb.attention import cross_chunk_attention, cross_chunk_einsum, in_batch_weights, select_pairs
from revela_nb.bench import BenchCase, bench_weights, case_weights, layer_inputs, random_lm, step_flops, time_in_turns, training_step, with_ratios
from revela_nb.kernel import TILES, list_pairs
from revela_nb.patching import in_batch_forward
from revela_nb.streams import attend, double_pairs, triton_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BEGUN = time.time()
MOST = 256 if GPU else 4 # chunks in one pass
OTHER_TILES = {"forward": [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2)],
               "queries": [(64, 32, 4, 2), (64, 32, 4, 4), (64, 64, 4, 2), (128, 32, 8, 3), (64, 16, 4, 3)],
               "keys": [(32, 64, 4, 2), (32, 64, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (16, 64, 4, 3), (32, 128, 8, 3)]}


def say(*words): print(f"[{time.time() - BEGUN:5.0f}]", *words, flush=True)


def gradients(read, inputs, weights, mask, grad, dtype):
    "Output and gradients of one way, in float64."
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs] + [weights.detach().to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_()]
    out = read(*leaves, mask)
    out.backward(grad.to(out.dtype))
    return [x.double() for x in (out.detach(), *(x.grad for x in leaves))]


def check_exactness(record):
    "Relative error of both GPU ways against the einsum in float64, of the output and of every gradient."
    for dtype, (n, h, hkv, l, d) in itertools.product((torch.float32, torch.bfloat16), ((6, 9, 3, 160, 64), (5, 4, 2, 37, 128)) if GPU else ((3, 4, 2, 9, 16),)):
        if not GPU and dtype == torch.bfloat16: continue
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(n, x, l, d, generator=g).to(DEVICE, dtype) for x in (h, hkv, hkv)]
        grad = torch.randn(n, h, l, d, generator=g).to(DEVICE, dtype)
        mask = (torch.arange(l) < torch.randint(1, l + 1, (n, 1), generator=g)).to(DEVICE)
        weights = in_batch_weights(torch.randn(n, n, generator=g).to(DEVICE), 1.0)
        exact = gradients(cross_chunk_einsum, inputs, weights, mask, grad, torch.float64)
        for name, read in (("triton", triton_attention), ("sdpa", cross_chunk_attention)):
            found = gradients(read, inputs, weights, mask, grad, dtype)
            found[4], exact[4] = (x * select_pairs(weights) for x in (found[4], exact[4]))      # the diagonal is never read
            errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
            record.append({"way": name, "dtype": str(dtype)[6:], "shape": [n, h, hkv, l, d]} | dict(zip(("output", "query", "key", "value", "weights"), errors)))
            say(record[-1])


def check_golden(record):
    "Loss and gradients of the authors' code on the GPU, float32, and with compiled layers."
    import sys
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from revela_nb.patching import compile_layers
    from test_golden import CASES, load_case
    for compiled in (False, True):
        model, t, meta = load_case(CASES[0])
        t = {k: x.to(DEVICE) for k, x in t.items()}
        model.to(DEVICE).train()
        if compiled: compile_layers(model)
        similarity = t["similarity"].clone().requires_grad_()
        out = in_batch_forward(model, t["input_ids"], t["attention_mask"], in_batch_weights(similarity, float(meta["temperature"])), labels=t["labels"])
        out.loss.backward()
        errors = {"loss": (out.loss - t["loss"]).abs().item(), "similarity": (similarity.grad - t["grad_similarity"]).abs().max().item()}
        errors |= {"parameters": max((p.grad - t[f"grad.{name}"]).abs().max().item() for name, p in model.named_parameters() if f"grad.{name}" in t)}
        record.append({"compiled": compiled, "head_size": model.config.hidden_size // model.config.num_attention_heads} | errors)
        say(record[-1])


def check_model(record):
    "Loss and gradients of a small Llama with heads of 64, float32: the shipped way against the einsum in its place."
    from transformers import LlamaConfig, LlamaForCausalLM
    from revela_nb.bench import attention_by, authors_attention
    from revela_nb.streams import read_chunks
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=192, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)).to(DEVICE).train()
    ids, mask, found = torch.randint(0, 300, (8, 50)).to(DEVICE), torch.ones(8, 50, dtype=torch.long, device=DEVICE), []
    mask[3:, 40:] = 0
    for read in (read_chunks, authors_attention):
        lm.zero_grad()
        weights = bench_weights(8, 4, 1.0).detach().to(DEVICE).requires_grad_()
        with attention_by(read): loss = in_batch_forward(lm, ids, mask, weights).loss
        loss.backward()
        found.append([loss.detach(), weights.grad * (weights > 0), *(p.grad.clone() for p in lm.parameters())])
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))
    record.append({"heads of 64": "the shipped way against the einsum", "worst": worst})
    say(record[-1])


def check_losses(record):
    "Both losses of the head in bf16, and their gradients, against float64."
    from revela_nb.loss import reported_loss, trained_loss
    g = torch.Generator().manual_seed(0)
    hidden, weight, targets = torch.randn(5000, 64, generator=g).to(DEVICE), 0.1 * torch.randn(1000, 64, generator=g).to(DEVICE), torch.randint(0, 1000, (5000,), generator=g).to(DEVICE)
    dtype, found = torch.bfloat16 if GPU else torch.float32, []
    for loss_of in (trained_loss, reported_loss, lambda h, w, t: torch.nn.functional.cross_entropy(h @ w.T, t)):
        leaves = [x.to(dtype).to(torch.float64 if len(found) == 2 else dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = loss_of(*leaves, targets)
        (2 * loss).backward()
        found.append([loss.detach().double(), *(x.grad.double() for x in leaves)])
    for name, ours in zip(("trained", "reported"), found):
        record.append({"loss": name} | {what: ((a - b).norm() / b.norm()).item() for what, a, b in zip(("value", "hidden", "weight"), ours, found[2])})
        say(record[-1])


def layer_ways(chunks, length, only=None):
    "Forward and forward with backward of one layer, by every way: neighbours alone, and both streams in one pass (twice the rows, and their own past)."
    inputs = layer_inputs("smollm2-135m", chunks, length)
    doubled = [x.detach().repeat(2, 1, 1, 1).requires_grad_() for x in inputs]
    mask, grad, ways = torch.ones(chunks, length, dtype=torch.bool, device=DEVICE), torch.randn_like(inputs[0]), {}
    for what, neighbours in (("all pairs", None), ("two a row", 2)):
        weights = bench_weights(chunks, min(16, chunks), 1.0, neighbours).detach().to(DEVICE).requires_grad_()
        pairs, more = list_pairs(weights.detach(), mask), grad.transpose(1, 2).repeat(2, 1, 1, 1).contiguous()
        kernels = lambda pairs=pairs: attend(*inputs, mask, pairs, False).transpose(1, 2)
        streams = lambda pairs=double_pairs(pairs): attend(*doubled, mask, pairs)
        stock = lambda weights=weights: cross_chunk_attention(*inputs, weights, mask)
        for name, read, g in (("triton", kernels, grad), ("sdpa", stock, grad), ("both streams", streams, more)):
            ways |= {f"{name}, {what}, forward": read, f"{name}, {what}, both": lambda read=read, g=g: read().backward(g)}
    return ways if only is None else ways[only]


def time_layers(record, sizes):
    for chunks, length in sizes:
        for pairs in (256, 4096):
            attention.PAIRS = pairs
            ways = {name: way for name, way in layer_ways(chunks, length).items() if pairs == 4096 or "sdpa" in name}
            record.append({"chunks": chunks, "length": length, "pairs_a_call": pairs, "seconds": time_in_turns(ways, 10 if GPU else 1)})
            say(record[-1])


def kernel_seconds(run, name, repeats=10):
    "What one kernel takes on the GPU each time."
    from torch.profiler import ProfilerActivity, profile
    for _ in range(3): run()
    if not GPU: return 0.
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats): run()
        torch.cuda.synchronize()
    return next(e.self_device_time_total / e.count for e in seen.key_averages() if e.key == name) / 1e6


def time_tiles(record, chunks, length):
    "Other tiles for each kernel, the others left as they are; the best is taken from here on."
    names = {"forward": "attend_forward", "queries": "backward_queries", "keys": "backward_keys"}
    for which, others in OTHER_TILES.items():
        shipped, results = TILES[which], {}
        for tiles in [shipped, *others] if GPU else [shipped]:
            TILES[which] = tiles
            try: results[tiles] = kernel_seconds(layer_ways(chunks, length, "both streams, two a row, both"), names[which])
            except Exception as fault: say(which, tiles, repr(fault)[:200])
        TILES[which] = min(results, key=results.get)
        record.append({"kernel": which, "shipped": shipped, "best": TILES[which], "seconds": {str(k): v for k, v in results.items()}})
        say(record[-1])


def busiest(step, most=30):
    "The kernels that take most of one step: (name, milliseconds, calls); the GPU's busy milliseconds in all; and its longest waits: (milliseconds, when, kernel after it)."
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as seen: step(); torch.cuda.synchronize()
    rows = sorted(((e.key[:90], e.self_device_time_total / 1e3, e.count) for e in seen.key_averages()), key=lambda r: -r[1])
    ran = sorted((e.time_range.start, e.time_range.end, e.name[:60]) for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    begun = ran[0][0] if ran else 0
    waits = [((b[0] - a[1]) / 1e3, round((b[0] - begun) / 1e3, 1), b[2]) for a, b in zip(ran, ran[1:]) if b[0] > a[1]]
    return {"kernels": [(name, round(ms, 3), n) for name, ms, n in rows[:most]], "busy_ms": round(sum(ms for _, ms, _ in rows), 2), "launches": len(ran),
            "waits_ms": round(sum(w[0] for w in waits), 2), "waits": [(round(ms, 3), *rest) for ms, *rest in sorted(waits, reverse=True)[:12]]}


def time_steps(record, cases, deadline, layers):
    "Whole steps, on one model; compiled ones last, since a layer stays compiled."
    torch._dynamo.reset()                                                                 # else lengths seen before would make shapes variable
    lm, plain = random_lm("smollm2-135m", layers), {}
    for case in cases:
        if time.time() - BEGUN > deadline: say("no time for", case); continue
        try:
            passes = 1 if case.checkpointing else max(case.chunks // MOST, 1)
            once, wait = training_step(replace(case, chunks=case.chunks // passes), lm), torch.cuda.synchronize if GPU else lambda: None
            def step():
                for _ in range(passes): once()
            if GPU: torch.cuda.empty_cache()
            seconds, issued = [], []
            for n in range(2 + case.repeats):
                lm.zero_grad(set_to_none=True)
                if GPU and n == 2: torch.cuda.reset_peak_memory_stats()
                wait(); start = time.perf_counter()
                step()
                issued.append(time.perf_counter() - start)
                wait(); seconds.append(time.perf_counter() - start)
            pairs = int(select_pairs(case_weights(case)).sum()) if case.method not in ("plain", "matched") else 0
            row = vars(case) | {"seconds": sorted(seconds[2:])[case.repeats // 2], "issued": sorted(issued[2:])[case.repeats // 2], "first": seconds[0], "passes": passes, "pairs": pairs, "flops": step_flops(case, pairs),
                                "peak": torch.cuda.max_memory_allocated() if GPU else 0, "device": torch.cuda.get_device_name() if GPU else "CPU"}
            if case.method == "plain": plain[case.chunks, case.compiled] = row
            if GPU: row = with_ratios(row, plain.get((case.chunks, case.compiled)))
            if GPU and case.compiled and passes == 1 and not case.checkpointing and (case.method, case.temperature) != ("fused", 1e-4): row |= busiest(step)
        except Exception as fault: row = vars(case) | {"skipped": f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}"}
        record.append(row)
        say({k: row[k] for k in ("method", "chunks", "passes", "temperature", "compiled", "checkpointing", "seconds", "issued", "busy_ms", "peak", "time_ratio", "utilisation", "skipped") if k in row})


def list_cases(chunks, layers):
    "16 groups in one pass; 64 groups as four passes whose gradients add up, and as one pass under checkpointing, where the plain model's logits would not fit."
    length = 160 if GPU else 8
    one = dict(layers=layers, length=length, repeats=5 if GPU else 1, group_size=16)
    few = one | {"repeats": 3 if GPU else 1}
    for method, tau in (("plain", 1.0), ("matched", 1.0), ("pairs", 1.0), ("fused", 1.0), ("sdpa", 1.0)): yield BenchCase(method, chunks=chunks[0], temperature=tau, **one)
    for method, tau in (("plain", 1.0), ("matched", 1.0), ("pairs", 1.0), ("lean", 1.0), ("fused", 1e-4), ("fused", 1.0)): yield BenchCase(method, chunks=chunks[0], temperature=tau, compiled=True, **one)
    for n in chunks[1:]:
        for method in ("plain", "pairs", "lean", "fused"): yield BenchCase(method, chunks=n, compiled=True, **few)
        for method in ("matched", "pairs", "fused"): yield BenchCase(method, chunks=n, compiled=True, checkpointing=True, **few)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "gpu.json")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--stages", nargs="+", default=["exactness", "golden", "tiles", "layers", "steps"], help="what to measure; the rest is kept from --out")
    parser.add_argument("--seconds", type=float, default=170, help="no further step is begun after so many")
    args = parser.parse_args()
    chunks, layers = (args.chunks, None) if GPU else ([4, 8], 1)
    names = {p: version(p) for p in ("torch", "triton", "transformers", "liger-kernel") if GPU or p not in ("triton", "liger-kernel")}
    report = {"date": str(date.today()), "device": torch.cuda.get_device_name() if GPU else "CPU (a rehearsal)", "versions": names, "exactness": [], "golden": [], "layers": [], "tiles": [], "steps": []}
    say(report["device"], names)
    length = 160 if GPU else 8
    stages = [("exactness", check_exactness), ("golden", check_golden), ("golden", check_model), ("golden", check_losses), ("tiles", lambda r: time_tiles(r, chunks[0], length)),
              ("layers", lambda r: time_layers(r, [(16 if GPU else 4, length), (chunks[0], length)])), ("steps", lambda r: time_steps(r, list_cases(chunks, layers), args.seconds, layers))]
    if args.out.exists(): report |= {k: v for k, v in json.loads(args.out.read_text(encoding="utf-8")).items() if k in {n for n, _ in stages} - set(args.stages) | {"of_stage", "earlier_run"}}
    report["of_stage"] = report.get("of_stage", {}) | {name: {"date": report["date"], "versions": names} for name in args.stages} # stages may come from several calls
    for name, stage in [s for s in stages if s[0] in args.stages]:
        try: stage(report[name])
        except Exception as fault: traceback.print_exc(limit=4); report[f"{name}_fault"] = repr(fault)[:500]
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
