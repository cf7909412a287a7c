"""One training step on 256 chunks of 160 tokens, 4 layers of SmolLM2-135M's shape, gradient checkpointing; for 24_speed.  usage: python nbs/_large.py [--group_size 16] [--temperature 1]

Adds a line to nbs/results/large.json: seconds and peak memory. One step takes minutes."""
import argparse
import datetime
import json
import time
from pathlib import Path

import torch

from revela_nb.bench import BenchCase, forget_peak, peak_memory, random_lm, training_step

OUT = Path(__file__).resolve().parent / "results" / "large.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=256)
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    case = BenchCase("fused", chunks=args.chunks, group_size=args.group_size, checkpointing=True, temperature=args.temperature)
    forget_peak()
    before = peak_memory()
    step = training_step(case, random_lm(case.shape, case.layers))
    start = time.perf_counter()
    step()
    row = dict(chunks=args.chunks, group_size=args.group_size, temperature=args.temperature, length=case.length, layers=case.layers, seconds=time.perf_counter() - start,
               peak_gb=(peak_memory() - before) / 1e9, threads=torch.get_num_threads(), date=str(datetime.date.today()))
    rows = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else []
    OUT.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")
    print(row)


if __name__ == "__main__": main()
