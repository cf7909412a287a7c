"""The plan that `revela train` prints against what the run then takes: seconds a step and peak memory of small trainings, for 17_launch.

usage: python nbs/_estimate.py [--cases ...] [--steps 3] [--out nbs/results/estimate.json]

Every case runs in a process of its own, on the GPU where there is one; the first step is not timed. The device's rate is measured by the plan before the run, and again after every step,
since other work may slow the machine down meanwhile. Peak memory is what comes on top of the imports: once as it is, once with MALLOC_MMAP_THRESHOLD_ set, so that glibc gives
freed tensors back to the system at once (two steps are enough for that). A second call measures what is missing."""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from revela_nb.batching import GroupCollator
from revela_nb.bench import SHAPES, forget_peak, peak_memory
from revela_nb.demo import backbone_folder
from revela_nb.launch import logit_rows, measure_rate, plan_run
from revela_nb.loading import LORA_TARGETS, add_lora
from revela_nb.model import Revela, build_lm
from revela_nb.retriever import Retriever
from revela_nb.trainer import RevelaArguments, RevelaTrainer, predicted_tokens

NBS = Path(__file__).resolve().parent
CASES = { # what differs from: the shipped backbone, all weights trained, 1 group of 16 chunks of 80 tokens, float32
    "40 tokens": dict(length=40),
    "80 tokens": {},
    "80 tokens, checkpointing": dict(checkpointing=True),
    "80 tokens, LoRA 16": dict(lora=16),
    "80 tokens, LoRA 16, checkpointing": dict(lora=16, checkpointing=True),
    "2 groups of 80 tokens": dict(groups=2),
    "80 tokens, bf16": dict(bf16=True),
    "4 layers, vocabulary of 49,152, 40 tokens": dict(shape="smollm2-135m", layers=4, length=40),
    "4 layers, vocabulary of 49,152, 80 tokens, checkpointing": dict(shape="smollm2-135m", layers=4, checkpointing=True),
}


class Clock(TrainerCallback):
    "Seconds from the end of a step to the end of the next, and the device's rate after each, which is not part of the step."
    def __init__(self, dtype): self.dtype, self.begin, self.seconds, self.rates = dtype, None, [], []
    def on_step_end(self, args, *more, **kwargs):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        if self.begin: self.seconds.append(time.perf_counter() - self.begin)
        self.rates.append(measure_rate(args.device, self.dtype))
        self.begin = time.perf_counter()


def make_model(tokenizer, shape=None, layers=None, lora=None):
    "The shipped backbone, or a shape of 14_bench with random weights, as retriever and as language model."
    from peft import LoraConfig
    adapter = lambda task: LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=LORA_TARGETS, task_type=task) if lora else None
    if shape is None: return Revela(Retriever.from_pretrained(backbone_folder(), lora=adapter("FEATURE_EXTRACTION"), pooling="mean"), build_lm(backbone_folder(), lora=adapter("CAUSAL_LM")), temperature=0.02)
    config = LlamaConfig(**{k: x for k, x in SHAPES[shape].items() if k != "model_type"} | {"num_hidden_layers": layers, "tie_word_embeddings": True})
    return Revela(Retriever(LlamaModel(config), tokenizer, pooling="mean"), LlamaForCausalLM(config), temperature=0.02)


def training_texts(chunks, words):
    "Groups of 16 chunks of this package's own source, each long enough to be cut."
    stream = " ".join(p.read_text(encoding="utf-8") for p in sorted((NBS.parent / "revela_nb").glob("*.py"))).split()
    pieces = [" ".join(stream[i:i + words]) for i in range(0, words * chunks, words)]
    return Dataset.from_dict({"texts": [pieces[i:i + 16] for i in range(0, chunks, 16)]})


def measure_case(steps, length=80, groups=1, checkpointing=False, bf16=False, shape=None, layers=None, lora=None):
    "Plan and train one case in this process."
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    texts, collator, clock = training_texts(16 * groups * steps, length), GroupCollator(tokenizer, tokenizer, max_length=length), Clock(torch.bfloat16 if bf16 else torch.float32)
    torch.manual_seed(0)
    forget_peak()
    at_rest = 0 if torch.cuda.is_available() else peak_memory()
    model = make_model(tokenizer, shape, layers, lora)
    with tempfile.TemporaryDirectory() as folder:
        args = RevelaArguments(output_dir=folder, max_steps=steps, warmup_steps=1, logging_steps=steps, save_strategy="no", disable_tqdm=True, bf16=bf16, report_to="none",
                               per_device_train_batch_size=groups, activation_checkpointing=checkpointing, use_cpu=not torch.cuda.is_available())
        plan = plan_run(model, args, texts, collator)
        trainer = RevelaTrainer(model, args, texts, collator, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    one, vocabulary = plan.operations / plan.steps, model.lm.config.vocab_size
    predicted = float(predicted_tokens(collator([texts[i] for i in range(groups)])))
    logits = {"logit_bytes": 12 * logit_rows(model, predicted) * vocabulary, "whole_logit_bytes": 24 * predicted * vocabulary}
    return {"planned_seconds": 3600 * plan.hours / plan.steps, "seconds": statistics.median(clock.seconds), "seconds_at_rate_in_run": one / statistics.median(clock.rates), "planned_bytes": plan.memory, "bytes": peak_memory() - at_rest, **logits, "operations": one,
            "steps": steps, "device": device, "torch": torch.__version__, "date": str(datetime.date.today())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES], metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--steps", type=int, default=3, help="of each case; the first is not timed")
    parser.add_argument("--out", type=Path, default=NBS / "results" / "estimate.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one: return print(json.dumps(measure_case(args.steps, **CASES[args.one])))
    records = {r["case"]: r for r in json.loads(args.out.read_text(encoding="utf-8"))} if args.out.exists() else {}
    def measure(case, steps, **env):
        command = [sys.executable, __file__, "--one", case, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
        if done.returncode: raise SystemExit(f"{case}: {done.stderr}")
        return json.loads(done.stdout.strip().splitlines()[-1])
    for case in args.cases:
        r = records.setdefault(case, {"case": case})
        if "seconds" not in r: r |= measure(case, args.steps)
        if "returned_bytes" not in r: r["returned_bytes"] = measure(case, 2, MALLOC_MMAP_THRESHOLD_="262144")["bytes"]
        print(f"{case:57} planned {r['planned_seconds']:6.2f} s, took {r['seconds']:6.2f} s   planned {r['planned_bytes'] / 1e9:5.2f} GB, took {r['bytes'] / 1e9:5.2f} GB, "
              f"{r['returned_bytes'] / 1e9:5.2f} GB if freed memory is returned", flush=True)
        args.out.write_text("[\n" + ",\n".join(json.dumps(records[c]) for c in CASES if c in records) + "\n]\n", encoding="utf-8")


if __name__ == "__main__": main()
