"""What the trainer adds to a step: `RevelaTrainer` against the bare step of `revela bench`, in turns; for 23_scaling.  usage: python nbs/_overhead.py [--rounds 3] [--steps 3] [--out nbs/results/overhead.json]

The shape is the bench's: 4 layers of SmolLM2-135M, 16 chunks of 160 tokens, all pairs read. The bench times forward and backward of the language model alone, so what a step of any training has besides is
added to its function: forward and backward of a retriever of the same shape, clipping, the optimiser. Tokenising, the loader, figures, gradient norms and the log are the trainer's. Every turn begins with a step that is not counted."""
import argparse
import datetime
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from revela_nb.attention import in_batch_weights
from revela_nb.batching import GroupCollator
from revela_nb.bench import BenchCase, random_lm, training_step
from revela_nb.demo import backbone_folder
from revela_nb.model import Revela
from revela_nb.retriever import Retriever
from revela_nb.trainer import RevelaArguments, RevelaTrainer

NBS = Path(__file__).resolve().parent
CASE = BenchCase("fused")


def make_groups(tokenizer, count):
    "Groups of chunks that are long enough to be cut to the length of the case."
    stream = " ".join(p.read_text(encoding="utf-8") for p in sorted((NBS.parent / "revela_nb").glob("*.py"))).split()
    pieces = [" ".join(stream[(29 * i) % 9000:][:CASE.length]) for i in range(count * CASE.chunks)]
    return Dataset.from_dict({"texts": [pieces[i:i + CASE.chunks] for i in range(0, len(pieces), CASE.chunks)]})


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def bare(model, batch, args, steps):
    "Seconds of every step: the bench's function, the retriever's forward and backward, clipping, the trainer's optimiser."
    optimizer_class, options = RevelaTrainer.get_optimizer_cls_and_kwargs(args)
    optimizer, language_model, times = optimizer_class(model.train().parameters(), **options), training_step(CASE, model.lm), []
    for _ in range(1 + steps):
        wait(); start = time.perf_counter()
        language_model()
        queries, passages = (model.retriever(batch[f"{kind}_input_ids"], batch[f"{kind}_attention_mask"]) for kind in ("query", "passage"))
        weights = in_batch_weights(queries.float() @ passages.float().T, CASE.temperature, CASE.chunks)
        (weights * torch.arange(CASE.chunks, device=weights.device)).sum().backward() # any gradient: the work is the same
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        wait(); times.append(time.perf_counter() - start)
    return times[1:]


class Clock(TrainerCallback):
    def __init__(self): self.at = []
    def on_step_end(self, *args, **kwargs):
        wait()
        self.at.append(time.perf_counter())


def trained(model, groups, collator, args):
    "Seconds from the end of a step to the end of the next; figures are logged every step, so each has the whole cost."
    clock = Clock()
    trainer = RevelaTrainer(model, args, groups, collator, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [b - a for a, b in zip(clock.at, clock.at[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--small", action="store_true", help="a rehearsal: 1 layer, 4 chunks of 32 tokens; give --out, too")
    parser.add_argument("--out", type=Path, default=NBS / "results" / "overhead.json")
    given = parser.parse_args()
    if given.small: CASE.layers, CASE.chunks, CASE.length, CASE.group_size = 1, 4, 32, 4
    torch.manual_seed(0)
    tokenizer, lm = AutoTokenizer.from_pretrained(backbone_folder()), random_lm(CASE.shape, CASE.layers)
    model = Revela(Retriever(random_lm(CASE.shape, CASE.layers).model, tokenizer, pooling="mean", max_length=CASE.length), lm, temperature=CASE.temperature)
    groups, collator, times = make_groups(tokenizer, 1 + given.steps), GroupCollator(tokenizer, tokenizer, max_length=CASE.length), {"bare": [], "trainer": []}
    batch = {name: x.to(lm.device) if torch.is_tensor(x) else x for name, x in collator([groups[0]]).items()}
    assert batch["input_ids"].shape == (CASE.chunks, CASE.length) and batch["attention_mask"].all()
    with tempfile.TemporaryDirectory() as folder:
        args = RevelaArguments(output_dir=folder, max_steps=1 + given.steps, warmup_steps=1, logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=not torch.cuda.is_available())
        for _ in range(given.rounds):
            times["bare"] += bare(model, batch, args, given.steps)
            times["trainer"] += trained(model, groups, collator, args)
    medians = {name: statistics.median(x) for name, x in times.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    report = {"bare_ms": 1e3 * medians["bare"], "trainer_ms": 1e3 * medians["trainer"], "ratio": medians["trainer"] / medians["bare"], "steps": len(times["bare"]), "bare_all": times["bare"], "trainer_all": times["trainer"],
              "group": f"{CASE.chunks} chunks of {CASE.length} tokens", "model": f"{CASE.layers} layers of {CASE.shape}, both", "device": device, "torch": torch.__version__, "date": str(datetime.date.today())}
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__": main()
