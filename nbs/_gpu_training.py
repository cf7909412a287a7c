"""SmolLM2-135M as retriever and as language model, trained on groups of Python documentation on one GPU, with a learning curve on cosqa; for 21_results.

usage: python nbs/_gpu_training.py --model FOLDER --data ../shared/data --out nbs/results/gpu_training.json [--seconds 320] [--arms revela:0 recipe:0 random:0 revela:1]

An arm is NAME:SEED. All share one budget of seconds, counted from the start of this program; every point is written as soon as it is measured, and an arm that
fails leaves its error and lets the others run. The learning rate's schedule is made for the steps that fit, by a few steps that are measured first and thrown away.
The model is the one that shared/tools/smollm2.py writes (SmolLM2-135M-Instruct out of 4-bit blocks)."""
import argparse
import contextlib
import datetime
import gc
import importlib
import json
import logging
import math
import tempfile
import time
import traceback
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from revela_nb.baselines import Replug
from revela_nb.batching import GroupCollator, make_groups
from revela_nb.corpus import chunk_corpus
from revela_nb.demo import versions
from revela_nb.evaluation import load_beir, passage_texts, score_queries
from revela_nb.loading import LORA_TARGETS
from revela_nb.model import Revela, build_lm
from revela_nb.reading import load_corpus
from revela_nb.retriever import Retriever
from revela_nb.trainer import RevelaArguments, RevelaTrainer
from revela_nb.training import write_json

BEGUN = time.time()
log = logging.getLogger("gpu_training")
# What every arm shares with configs/smollm2-135m-code.yaml is not said here: groups of 16 chunks, 160 tokens, prefixes, bf16 autocast over float32 weights, one pass
SURE = dict(kind="Revela", pooling="mean", value_norm="rescaled", lora=16, alpha=32, dropout=0.0, temperature=0.02, learning_rate=1e-3, checkpointing=False, strategy="document")
ARMS = {
    "revela": SURE, # what short training was surest with (09_demo)
    "random": SURE | dict(strategy="random"), # control: the same chunks, put together by chance
    # the config but for temperature (there 1e-4), learning rate (1e-4, which has 11,000 steps to work), warm-up, groups a step (32), and its language model (Llama-3.2-1B)
    "recipe": SURE | dict(pooling="eos", value_norm="unit", lora=256, alpha=64, dropout=0.1, learning_rate=5e-4, checkpointing=True),
    "replug": SURE | dict(kind="Replug", temperature=0.1),
}
# what the record says beside each arm's settings: where all arms differ from the config
DIFFERS = {"config": "configs/smollm2-135m-code.yaml", "models": "SmolLM2-135M-Instruct out of 4-bit blocks, as retriever and as language model (there SmolLM2-135M and Llama-3.2-1B)",
           "groups": "devdocs_python, chunks of 120 words, runs of 4 neighbours (there the authors' 358,763 groups)", "a step": "groups_a_step groups (there 32)",
           "optimiser": "beta2 0.98, weight decay 0.01, warm-up of an eighth of the steps, 20 at most (there 0.999, 0, 100 steps)",
           "evaluation": "160 tokens a text, bf16, the best 100 documents"}
POINTS = (0.03, 0.08, 0.17, 0.33, 0.5, 0.75, 1.0) # of an arm's steps, where the curve is measured, after step 0
LOGGED = ("step", "loss", "plain_loss", "gain", "effective_neighbours", "similarity_mean", "similarity_std", "grad_norm_lm", "grad_norm_retriever", "tokens_per_second")
TASKS = (("cosqa", "dev"), ("cosqa", "test"), ("scifact", "test"))


def device(): return torch.device("cuda" if torch.cuda.is_available() else "cpu")
def elapsed(): return round(time.time() - BEGUN, 1)


def in_bf16(): return torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else contextlib.nullcontext()


def settle():
    "Wait for the GPU."
    if torch.cuda.is_available(): torch.cuda.synchronize()


def sweep():
    "Give memory back between arms."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(): return round(torch.cuda.max_memory_allocated() / 1e9, 1) if torch.cuda.is_available() else None


def load_tasks(data, limit):
    "(name, split) -> corpus, queries, judgements; with a limit the first queries and few documents."
    found = {(name, split): load_beir(Path(data) / name, split) for name, split in TASKS}
    if not limit: return found
    judged = {task: {q: qrels[q] for q in list(qrels)[:limit]} for task, (_, _, qrels) in found.items()}
    kept = {d for qrels in judged.values() for row in qrels.values() for d in row}
    def few(corpus): return {d: x for i, (d, x) in enumerate(corpus.items()) if d in kept or i < 2 * limit}
    return {task: (few(corpus), {q: queries[q] for q in judged[task]}, judged[task]) for task, (corpus, queries, _) in found.items()}


@torch.inference_mode()
def search_all(retriever, corpus, asked, batch=512, k=100):
    "The best k documents of each of several sets of queries, by exact dot products where the model is."
    with in_bf16():
        passages = retriever.encode_passages(passage_texts(corpus), batch, progress=False).to(device())
        embedded = [retriever.encode_queries(list(queries.values()), batch, progress=False).to(device()) for queries in asked]
    ids, runs = list(corpus), []
    for queries, vectors in zip(asked, embedded):
        scores, places = (x.tolist() for x in (vectors @ passages.T).topk(min(k, len(ids))))
        runs.append({q: {ids[i]: s for i, s in zip(row_i, row_s)} for q, row_i, row_s in zip(queries, places, scores)})
    return runs


def measure(retriever, tasks, wanted=TASKS):
    "Figures of a retriever on some of the tasks; one encoding for those that share their corpus."
    out, mine = {}, [t for t in tasks if t in wanted]
    for name in dict.fromkeys(name for name, _ in mine):
        same = [t for t in mine if t[0] == name]
        for task, run in zip(same, search_all(retriever, tasks[same[0]][0], [tasks[t][1] for t in same])):
            corpus, queries, qrels = tasks[task]
            scores = score_queries(run, qrels)
            means = {m: sum(s[m] for s in scores.values()) / len(scores) for m in ("ndcg@10", "recall@100", "mrr@10")}
            out["-".join(task)] = means | {"queries": len(queries), "documents": len(corpus), "per_query": [round(scores[q]["ndcg@10"], 4) for q in qrels]}
    return out


def build(model, arm, max_length):
    "The arm's Revela on its device, adapters drawn anew."
    def adapter(task): return LoraConfig(r=arm["lora"], lora_alpha=arm["alpha"], lora_dropout=arm["dropout"], target_modules=LORA_TARGETS, task_type=task)
    retriever = Retriever.from_pretrained(model, lora=adapter("FEATURE_EXTRACTION"), pooling=arm["pooling"], max_length=max_length)
    lm = build_lm(model, lora=adapter("CAUSAL_LM"))
    kind = {"Revela": Revela, "Replug": Replug}[arm["kind"]]
    return kind(retriever, lm, arm["temperature"], value_norm=arm["value_norm"]).to(device())


def arguments(arm, steps, batch, seed, folder):
    "The trainer's options; no checkpoints."
    warmup = max(1, min(20, steps // 8))
    return RevelaArguments(output_dir=folder, max_steps=steps, seed=seed, learning_rate=arm["learning_rate"], warmup_steps=warmup, lr_scheduler_type="linear", adam_beta2=0.98,
                           weight_decay=0.01, per_device_train_batch_size=batch, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, bf16=torch.cuda.is_available(),
                           activation_checkpointing=arm["checkpointing"], use_cpu=not torch.cuda.is_available())


class Watch(TrainerCallback):
    "Stops at the deadline; calls `point` where the curve is measured; counts what was read, and the seconds without evaluation."
    def __init__(self, points=(), deadline=math.inf, point=None):
        self.points, self.deadline, self.point, self.trainer = set(points), deadline, point, None
        self.groups = self.tokens = self.apart = 0
        self.ends = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.time()
        if self.point: self.call(0)

    def on_step_end(self, args, state, control, **kwargs):
        batch = self.trainer.batch
        self.groups += len(batch["input_ids"]) // batch["group_size"]
        self.tokens += int(batch["attention_mask"].sum())
        settle()
        self.ends.append(time.time())
        if time.time() > self.deadline: control.should_training_stop = True
        if self.point and (state.global_step in self.points or control.should_training_stop): self.call(state.global_step)

    def call(self, step):
        "Measure, apart from training's clock."
        before = time.time()
        self.point(step, round(before - self.start - self.apart, 2))
        self.apart += time.time() - before


def train(model, arm, groups, steps, batch, seed, watch):
    "Run the trainer; its log."
    retriever = model.retriever
    collator = GroupCollator(retriever.tokenizer, retriever.tokenizer, retriever.max_length, retriever.query_prefix, retriever.passage_prefix)
    with tempfile.TemporaryDirectory() as folder:
        trainer = RevelaTrainer(model=model, args=arguments(arm, steps, batch, seed, folder), train_dataset=groups, data_collator=collator, callbacks=[watch])
        watch.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [r for r in trainer.state.log_history if "in_batch_loss" in r]


def steps_measured(make, arm, groups, batches, steps):
    "Seconds a step, groups a step (the most that fit in memory), peak memory. The first two steps compile and are not counted."
    for batch in batches:
        try:
            watch, model = Watch(), make(arm)
            train(model, arm, groups, steps, batch, 0, watch)
            ends = watch.ends[min(2, len(watch.ends) - 2):]
            return {"seconds_a_step": round((ends[-1] - ends[0]) / (len(ends) - 1), 4), "groups_a_step": batch, "peak_gb": peak_gb()}
        except RuntimeError as error: # torch.OutOfMemoryError is one
            if "out of memory" not in str(error).lower(): raise
            log.warning("%d groups a step: out of memory (peak %s GB)", batch, peak_gb())
        watch = model = None
        sweep()
    raise MemoryError(f"no step of {batches[-1]} groups fits")


def never(*args): return False


def calibrated(*args):
    "`steps_measured`; without the Triton kernels if that fails."
    try: return steps_measured(*args)
    except Exception:
        if not torch.cuda.is_available(): raise
        log.exception("trying without the Triton kernels")
        for name in ("streams", "patching"): importlib.import_module(f"revela_nb.{name}").runs_triton = never
    sweep()
    return steps_measured(*args) | {"triton": False}


def save_adapter(retriever, path, most=16 * 2**20):
    "The adapter in bf16, if the file stays below `most` bytes."
    if not isinstance(retriever.encoder, PeftModel): return None
    state = get_peft_model_state_dict(retriever.encoder, save_embedding_layers=False)
    state = {name: x.detach().to("cpu", torch.bfloat16).contiguous() for name, x in state.items()}
    if sum(x.numel() * 2 for x in state.values()) > most - 200_000: return None
    save_file(state, path, metadata={"format": "pt"})
    return path.name


class Run:
    "All arms, one record."
    def __init__(self, args):
        self.args, self.deadline = args, BEGUN + args.seconds
        self.speeds, self.untrained, self.groups, self.planned = {}, {}, {}, {}
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        self.record = {"device": name, "date": str(datetime.date.today()), "versions": versions(), "seconds": args.seconds, "limit": args.limit, "differs": DIFFERS, "calibration": [], "runs": []}

    def save(self): write_json(self.record | {"elapsed": elapsed()}, self.args.out)

    def prepare(self):
        "Tasks and chunks."
        self.tasks = load_tasks(self.args.data, self.args.limit)
        self.chunks = chunk_corpus(load_corpus(str(Path(self.args.data) / "devdocs_python" / self.args.corpus)))
        log.info("%d chunks and the tasks are read (%s s)", len(self.chunks), elapsed())

    def groups_of(self, strategy, seed):
        "Made once."
        key = strategy, seed
        if key not in self.groups: self.groups[key] = make_groups(self.chunks, group_size=16, strategy=strategy, seed=seed)
        return self.groups[key]

    def make(self, arm): return build(self.args.model, arm, self.args.max_length)

    def speed_of(self, arm):
        "Seconds and groups a step, measured once for every kind of step."
        key = tuple(arm[k] for k in ("kind", "lora", "dropout", "checkpointing", "value_norm"))
        if key not in self.speeds:
            begun = time.time()
            self.speeds[key] = calibrated(self.make, arm, self.groups_of("document", 0), self.args.groups_a_step, self.args.trial_steps)
            sweep()
            self.record["calibration"].append(dict(zip(("kind", "lora", "dropout", "checkpointing", "value_norm"), key)) | self.speeds[key] | {"took": round(time.time() - begun, 1)})
            self.save()
            log.info("%s: %s (%s s)", key, self.speeds[key], elapsed())
        return self.speeds[key]

    def before(self, arm):
        "The untrained retriever's figures, once for each pooling; and what a point of the curve and all tasks cost in seconds."
        if arm["pooling"] not in self.untrained:
            retriever = Retriever.from_pretrained(self.args.model, pooling=arm["pooling"], max_length=self.args.max_length).to(device()) # a new adapter changes nothing
            measure(retriever, self.tasks, TASKS[:1]) # the first call is slow
            begun = time.time()
            figures = measure(retriever, self.tasks)
            whole = 1.4 * (time.time() - begun) # an adapter costs time
            times = whole / 2, whole # scifact's corpus costs a little more than cosqa's
            self.untrained[arm["pooling"]] = figures, *times
            log.info("untrained, %s: %s; a point costs %.1f s, all tasks %.1f s (%s s)", arm["pooling"], means(figures), *times, elapsed())
        return self.untrained[arm["pooling"]]

    def plan(self, arm, speed, left):
        "Steps that fit; arms that differ in groups alone take the same number."
        key = json.dumps({k: v for k, v in arm.items() if k != "strategy"})
        if key not in self.planned: self.planned[key] = self.args.max_steps or max(8, int(0.93 * left / speed["seconds_a_step"]))
        return self.planned[key]

    def arm(self, run, share):
        "Train one arm within its share of seconds and measure it along the way."
        name, seed, arm, begun = run["arm"], run["seed"], run["settings"], time.time()
        groups, speed, (run["before"], point, final) = self.groups_of(arm["strategy"], seed), self.speed_of(arm), self.before(arm)
        set_seed(seed)
        model = self.make(arm)
        steps = self.plan(arm, speed, begun + share - time.time() - len(POINTS) * point - final)
        points = sorted({max(1, round(p * steps)) for p in POINTS})
        run |= {"steps_planned": steps, "groups_a_step": speed["groups_a_step"], "groups_there": len(groups), "seconds_a_point": round(point, 2)}
        log.info("%s:%d: %d steps of %d groups in %.0f s; curve at %s", name, seed, steps, speed["groups_a_step"], share, points)
        watch = Watch(points, min(begun + 1.2 * share, self.deadline) - point - final - 2)
        watch.point = lambda step, seconds: self.point(model, run, watch, step, seconds)
        history = train(model, arm, groups, steps, speed["groups_a_step"], seed, watch)
        run |= {"steps": len(watch.ends), "train_seconds": run["curve"][-1]["seconds"], "peak_gb": peak_gb(), "log": [{k: round(r[k], 5) for k in LOGGED if k in r} for r in history]}
        for at in run["curve"][1:]: at |= recent(history, at["step"])
        self.save()
        run["after"] = measure(model.retriever, self.tasks)
        log.info("%s:%d after %d steps: %s (%s s)", name, seed, run["steps"], means(run["after"]), elapsed())
        self.save()
        run["adapter"] = save_adapter(model.retriever, Path(self.args.out).with_name(f"adapter_{name}_{seed}.safetensors"))
        self.save()

    def point(self, model, run, watch, step, seconds):
        "One point of the curve, written at once."
        known = self.untrained[run["settings"]["pooling"]][0] if step == 0 else measure(model.retriever, self.tasks, TASKS[:1])
        dev, read = known["cosqa-dev"], recent(watch.trainer.state.log_history, step)
        run["curve"].append({"step": step, "seconds": seconds, "groups": watch.groups, "tokens": watch.tokens, "dev_ndcg@10": dev["ndcg@10"], "dev_recall@100": dev["recall@100"]} | read)
        self.save()
        log.info("  %s:%d step %d, %.1f s of training: dev nDCG@10 %.4f %s", run["arm"], run["seed"], step, seconds, dev["ndcg@10"], read)

    def guarded(self, run, work, *args):
        "Do it; an error goes into the record."
        try: work(*args)
        except Exception as error:
            log.exception("%s:%d failed", run["arm"], run["seed"])
            run["error"] = "".join(traceback.format_exception(error))[-3000:]
        sweep()
        self.save()

    def all(self):
        "Every arm; the failure of one does not touch the others. What is measured first is not taken from anybody's share."
        self.prepare()
        runs = self.record["runs"] = [{"arm": name, "seed": seed, "settings": ARMS[name], "curve": []} for name, seed in self.args.arms]
        for run in runs:
            for work in (self.speed_of, self.before): self.guarded(run, work, run["settings"])
        runs = [run for run in runs if "error" not in run]
        for number, run in enumerate(runs):
            left = self.deadline - time.time()
            if left > 15 or self.args.max_steps: self.guarded(run, self.arm, run, left / (len(runs) - number))
            else: run["error"] = "no time was left"
        self.save()
        log.info("done (%s s)", elapsed())


def recent(history, step, most=5):
    "Mean loss and gain of the last few steps up to this one."
    rows = [r for r in history if "gain" in r and r["step"] <= step][-most:]
    return {k: round(sum(r[k] for r in rows) / len(rows), 5) for k in ("loss", "gain") if rows}


def means(figures): return {name: round(f["ndcg@10"], 4) for name, f in figures.items()}


def arm_and_seed(text):
    "NAME:SEED"
    name, _, seed = text.partition(":")
    if name not in ARMS: raise argparse.ArgumentTypeError(f"no arm {name!r}: there are {', '.join(ARMS)}")
    return name, int(seed or 0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--data", required=True, help="holds devdocs_python, cosqa, scifact")
    parser.add_argument("--corpus", default="training_corpus.jsonl.gz", help="file in devdocs_python")
    parser.add_argument("--out", required=True, help="JSON file; adapters go beside it")
    parser.add_argument("--seconds", type=float, default=320, help="for all, loading included")
    parser.add_argument("--arms", type=arm_and_seed, nargs="+", default=[("revela", 0), ("recipe", 0), ("random", 0), ("revela", 1)])
    parser.add_argument("--groups_a_step", type=int, nargs="+", default=[6, 4, 2], help="the first that fits into memory")
    parser.add_argument("--max_steps", type=int, help="of each arm, instead of what fits")
    parser.add_argument("--trial_steps", type=int, default=7, help="measured first and thrown away")
    parser.add_argument("--max_length", type=int, default=160, help="tokens of a text; less for rehearsals")
    parser.add_argument("--limit", type=int, help="queries of each task, for rehearsals")
    return parser.parse_args()


def main():
    args = parse()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    log.setLevel(logging.INFO)
    Run(args).all()


if __name__ == "__main__": main()
