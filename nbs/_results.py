"""Train and measure every method on the same groups, for 21_results.  usage: python nbs/_results.py [--steps 150] [--seeds 0 1 2] [--methods ...] [--data ../shared/data]

Each finished (method, seed) goes into nbs/results/results.json at once; a second call does only what is missing. Records of other settings are refused."""
import argparse
import functools
import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from transformers import set_seed

from revela_nb.baselines import Contrastive, Replug, SimCSE, counting_reads
from revela_nb.corpus import load_corpus
from revela_nb.demo import MAX_LENGTH, backbone_folder, demo_groups, demo_model, docstring_task, train_demo, versions
from revela_nb.evaluation import bm25_run, dense_run, load_beir, score_queries
from revela_nb.model import Revela
from revela_nb.retriever import Retriever

log = logging.getLogger("results")
NBS = Path(__file__).resolve().parent
RESULTS = NBS / "results" / "results.json"
# method -> class and temperature: Revela's is the demo's, each baseline has its paper's
METHODS = {"revela": (Revela, 0.02), "replug": (Replug, 0.1), "contrastive": (Contrastive, 0.05), "simcse": (SimCSE, 0.05)}
REFERENCES = ("untrained", "untrained_eos", "bm25") # nothing to train, so one seed
DOCUMENTS, QUERIES = 500, 200 # at most, of every task


def sample_task(corpus, queries, qrels, seed=0):
    "The first queries, all documents judged for them, and a random sample of the others."
    asked = list(queries)[:QUERIES]
    kept = {d for q in asked for d in qrels[q] if d in corpus}
    others = sorted(corpus.keys() - kept)
    kept |= set(random.Random(seed).sample(others, max(0, min(len(others), DOCUMENTS - len(kept)))))
    return {d: x for d, x in corpus.items() if d in kept}, {q: queries[q] for q in asked}, {q: qrels[q] for q in asked}


def tasks(data):
    "name -> (corpus, queries, qrels), and how many documents there were."
    found = {"docstring": docstring_task(load_corpus("python:stdlib"), DOCUMENTS, QUERIES)}
    sizes = {"docstring": len(found["docstring"][0])}
    for name in ("cosqa", "scifact", "squad"):
        whole = load_beir(Path(data) / name)
        found[name], sizes[name] = sample_task(*whole), len(whole[0])
    return found, sizes


def measure(run_of, found, sizes):
    "Figures of one system on every task, query by query."
    out = {}
    for name, (corpus, queries, qrels) in found.items():
        start = time.time()
        scores = score_queries(run_of(corpus, queries), qrels)
        mean = {m: sum(s[m] for s in scores.values()) / len(scores) for m in ("ndcg@10", "recall@100", "mrr@10")}
        out[name] = mean | {"queries": len(queries), "documents": len(corpus), "of_documents": sizes[name], "seconds": round(time.time() - start, 1),
                            "per_query": [round(scores[q]["ndcg@10"], 4) for q in qrels]}
        log.info("  %s nDCG@10 %.4f (%d queries, %d of %d documents, %.0f s)", name, mean["ndcg@10"], len(queries), len(corpus), sizes[name], out[name]["seconds"])
    return out


def train(method, seed, steps, groups):
    "A trained retriever, and what its training read and took."
    set_seed(seed)
    kind, temperature = METHODS[method]
    model = demo_model(backbone_folder(), kind)
    model.temperature = temperature
    start = time.time()
    with tempfile.TemporaryDirectory() as folder, counting_reads(model.lm) as lm, counting_reads(model.retriever.encoder) as embedded:
        history = train_demo(model, groups, steps, seed, folder)
    return model.retriever, {"train_seconds": round(time.time() - start, 1), "lm_rows": lm["rows"], "lm_tokens": lm["tokens"], "retriever_rows": embedded["rows"],
                             "retriever_tokens": embedded["tokens"], "temperature": temperature, "log": [{k: r[k] for k in ("step", "loss", "gain")} for r in history]}


def store(records):
    "Write all records in one step."
    partial = RESULTS.with_name(".results.partial")
    partial.write_text(json.dumps(records, indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")
    os.replace(partial, RESULTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of one group")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[*REFERENCES, *METHODS], choices=[*REFERENCES, *METHODS])
    parser.add_argument("--data", default=NBS.parent.parent / "shared" / "data", help="holds cosqa, scifact, squad in BEIR's layout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="for rehearsals")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    globals()["RESULTS"] = args.out
    records = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    other = [r for r in records if r["method"] in METHODS and r["steps"] != args.steps]
    if other: raise SystemExit(f"{args.out} holds runs of {other[0]['steps']} steps, not {args.steps}: all methods need the same; move it away or take --steps {other[0]['steps']}")
    done = {(r["method"], r["seed"]) for r in records}
    found, sizes = tasks(args.data)
    groups_of = functools.cache(lambda seed: demo_groups(found["docstring"][1], seed)) # the same groups for every method
    # seed by seed, so that an interrupted run has all methods of the first seeds
    for seed, method in [(s, m) for s in args.seeds for m in args.methods]:
        if (method, seed) in done or (method in REFERENCES and seed != args.seeds[0]): continue
        log.info("%s, seed %d", method, seed)
        facts = {"method": method, "seed": seed, "steps": 0 if method in REFERENCES else args.steps, "threads": torch.get_num_threads()}
        if method == "bm25": run_of = bm25_run
        else:
            if method in METHODS: retriever, cost = train(method, seed, args.steps, groups_of(seed)); facts |= cost
            else: retriever = Retriever.from_pretrained(backbone_folder(), pooling="eos" if method.endswith("eos") else "mean", max_length=MAX_LENGTH)
            run_of = functools.partial(dense_run, retriever)
        records.append(facts | {"tasks": measure(run_of, found, sizes), "versions": versions()})
        store(records)


if __name__ == "__main__": main()
