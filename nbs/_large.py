"""One training step on 256 chunks of 160 tokens, 4 layers of SmolLM2-135M's shape, gradient checkpointing, AdamW on all weights; for 24_speed.  usage: python nbs/_large.py [--threads 2] [--chunks 256]

Writes nbs/results/large.json: seconds and peak memory, once for groups of 16 at temperature 1 and once for one group at the paper's 1e-4, each in a
process of its own. A step on 4 chunks comes first, so that AdamW's two moments are there when the large one begins. Minutes each."""
import argparse
import datetime
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from revela_nb.bench import BenchCase, forget_peak, needed_bytes, peak_memory, random_lm, training_step

OUT = Path(__file__).resolve().parent / "results" / "large.json"


def measure(chunks, group_size, temperature, threads):
    "A step with the optimizer's, and the peak from before the model was made to its end."
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = BenchCase("fused", chunks=chunks, group_size=group_size, checkpointing=True, temperature=temperature)
    forget_peak()
    before = peak_memory()
    lm = random_lm(case.shape, case.layers)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4)
    def full_step(step):
        optimizer.zero_grad(set_to_none=True)
        start = time.perf_counter()
        step()
        optimizer.step()
        return time.perf_counter() - start
    full_step(training_step(BenchCase("fused", chunks=4, group_size=4, checkpointing=True), lm))
    seconds = full_step(training_step(case, lm))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
    return dict(chunks=chunks, group_size=group_size, temperature=temperature, length=case.length, layers=case.layers, optimizer="AdamW",
                seconds=seconds, peak_gb=(peak_memory() - before) / 1e9, estimated_gb=needed_bytes(case) / 1e9, threads=threads,
                torch=torch.__version__, date=str(datetime.date.today()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for group_size, temperature in ((16, 1.0), (args.chunks, 1e-4)):
            rows.append(pool.submit(measure, args.chunks, group_size, temperature, args.threads).result())
            print(rows[-1], flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
