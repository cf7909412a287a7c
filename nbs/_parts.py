"""Seconds of each part of a training step, alone, in turns, and what this machine can do, in one run; for 24_speed.  usage: python nbs/_parts.py [--chunks 16] [--length 160] [--repeats 5]

Writes nbs/results/parts.json: operations and bytes a second of the machine, median seconds of each part, forward and backward, at 4 layers of SmolLM2-135M's shape."""
import argparse
import datetime
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from revela_nb.bench import BenchCase, bench_weights, layer_inputs, random_lm, time_in_turns, training_step
from revela_nb.streams import read_chunks
from revela_nb.loss import reported_loss, trained_loss

OUT = Path(__file__).resolve().parent / "results" / "parts.json"


def back(out): out.backward(out.detach())


def layer_parts(lm, chunks, length):
    "Of one layer. Projections and MLP see both streams, 2N rows; reading only the in-batch half."
    layer, attention = lm.model.layers[0], lm.model.layers[0].self_attn
    x = torch.randn(2 * chunks, length, lm.config.hidden_size, requires_grad=True)
    rows, half, mask = layer_inputs("smollm2-135m", 2 * chunks, length), layer_inputs("smollm2-135m", chunks, length), torch.ones(chunks, length, dtype=torch.bool)
    def project():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj): back(linear(x))
    def read(neighbours):
        weights = bench_weights(chunks, chunks, 1.0, neighbours).detach()
        return lambda: back(read_chunks(*half, weights.clone().requires_grad_(), mask))
    return {"projections": project, "MLP": lambda: back(layer.mlp(x)), "norms": lambda: (back(layer.input_layernorm(x)), back(layer.post_attention_layernorm(x))),
            "self-attention": lambda: back(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)),
            "reading, all pairs": read(None), "reading, 2 a row": read(2)}


def step_parts(lm, chunks, length):
    "Of a whole step: the head, the retriever (the same four layers: passages, and queries of half their length), and the step itself without retriever."
    tokens, weight = chunks * (length - 1), lm.get_output_embeddings().weight
    busy, quiet = (torch.randn(tokens, lm.config.hidden_size, requires_grad=True) for _ in range(2))
    targets = torch.randint(0, lm.config.vocab_size, (tokens,))
    passages, queries = (torch.randint(0, lm.config.vocab_size, (chunks, n)) for n in (length, length // 2))
    def head():
        trained_loss(busy, weight, targets).backward()
        reported_loss(quiet, weight, targets)
    def retrieve(): back(torch.cat([lm.model(ids, use_cache=False).last_hidden_state[:, -1] for ids in (passages, queries)]))
    case = dict(chunks=chunks, length=length, group_size=chunks)
    return {"head": head, "retriever": retrieve, "step, all pairs": training_step(BenchCase("fused", **case), lm), "step, 2 a row": training_step(BenchCase("pairs", **case), lm)}


def machine(repeats):
    "Operations a second in a large matrix product, bytes a second through memory."
    a, b, big = torch.randn(2048, 576), torch.randn(576, 2048), torch.randn(32_000_000)
    seconds = time_in_turns({"rate": lambda: [a @ b for _ in range(10)], "band": lambda: big.clone()}, 2 * repeats)
    return {"rate": 10 * 2 * 2048 * 576 * 2048 / seconds["rate"], "band": 2 * 4 * big.numel() / seconds["band"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(0)
    lm = random_lm("smollm2-135m", 4)
    report = machine(args.repeats)
    ways = layer_parts(lm, args.chunks, args.length) | step_parts(lm, args.chunks, args.length)
    report |= {"seconds": time_in_turns(ways, args.repeats), "chunks": args.chunks, "length": args.length, "layers": 4, "repeats": args.repeats,
               "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(datetime.date.today())}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__": main()
