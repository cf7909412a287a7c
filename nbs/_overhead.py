"""What the trainer adds to a step: `RevelaTrainer` against the bare forward, backward and AdamW on the same batches, in turns; for 23_scaling.  usage: python nbs/_overhead.py [--rounds 4]

Writes nbs/results/scaling.json."""
import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from revela_nb.batching import GroupCollator
from revela_nb.demo import backbone_folder
from revela_nb.model import Revela
from revela_nb.retriever import Retriever
from revela_nb.trainer import RevelaArguments, RevelaTrainer

NBS = Path(__file__).resolve().parent
STEPS, WARM = 8, 2 # of a turn, of which the first are not counted


def make_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)
    return Revela(Retriever(LlamaModel(config), tokenizer, pooling="mean"), LlamaForCausalLM(config), temperature=0.02)


def bare(model, groups, collator):
    "Seconds of every step of a plain loop."
    optimizer, times = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0), []
    for group in groups[:STEPS]:
        start = time.perf_counter()
        model(**collator([group])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return times[WARM:]


class Clock(TrainerCallback):
    def __init__(self): self.at = []
    def on_step_end(self, *args, **kwargs): self.at.append(time.perf_counter())


def trained(model, groups, collator):
    "Seconds of every step of the trainer; figures are logged every 4."
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = RevelaArguments(output_dir=folder, max_steps=STEPS, warmup_steps=1, logging_steps=4, save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential")
        trainer = RevelaTrainer(model, args, Dataset.from_list(groups), collator, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [b - a for a, b in zip(clock.at[WARM - 1:], clock.at[WARM:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    words = (NBS.parent / "revela_nb" / "trainer.py").read_text(encoding="utf-8").split()
    groups = [{"texts": [" ".join(words[(37 * g + 60 * i) % 900:][:60]) for i in range(16)]} for g in range(STEPS)]
    collator, times = GroupCollator(tokenizer, tokenizer, max_length=48), {"bare": [], "trainer": []}
    for _ in range(args.rounds):
        times["bare"] += bare(make_model(tokenizer), groups, collator)
        times["trainer"] += trained(make_model(tokenizer), groups, collator)
    medians = {name: statistics.median(x) for name, x in times.items()}
    report = {"overhead": {"bare_ms": 1e3 * medians["bare"], "trainer_ms": 1e3 * medians["trainer"], "ratio": medians["trainer"] / medians["bare"], "steps": len(times["bare"]),
                           "group": "16 chunks of at most 48 tokens", "model": "4 layers of 192, both", "device": f"CPU, {torch.get_num_threads()} thread(s)", "torch": torch.__version__, "date": str(datetime.date.today())}}
    (NBS / "results" / "scaling.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__": main()
