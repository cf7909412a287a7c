"""Train and measure every method on the same groups, for 21_results; or Revela with one thing changed at a time, for the ablations there and 22_strategies.

usage: python nbs/_results.py [--ablations] [--bf16] [--steps 150] [--seeds 0 1 2] [--methods ...] [--data ../shared/data] [--out FILE]

Each finished (method, seed) goes into nbs/results/results.json (ablations.json) at once; a second call does only what is missing. Records of other settings are refused."""
import argparse
import datetime
import functools
import hashlib
import json
import logging
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from tqdm import tqdm
from transformers import set_seed

from revela_nb.baselines import Contrastive, Replug, SimCSE, counting_reads
from revela_nb.batching import GROUP_FEATURES, make_groups
from revela_nb.compare import fuse_ranks
from revela_nb.corpus import chunk_corpus
from revela_nb.reading import load_corpus
from revela_nb.demo import CHUNK_WORDS, MAX_LENGTH, TRAIN_LENGTH, backbone_folder, demo_model, docstring_task, function_documents, sample_documents, train_demo, versions
from revela_nb.bm25 import bm25_run
from revela_nb.evaluation import dense_run, load_beir, score_queries
from revela_nb.grouping import EMBEDDING, group_by, parse_strategy
from revela_nb.model import Revela
from revela_nb.prepare import deal_documents
from revela_nb.retriever import Retriever

log = logging.getLogger("results")
NBS = Path(__file__).resolve().parent
# method -> class and temperature: Revela's is the demo's, each baseline has its paper's
METHODS = {"revela": (Revela, 0.02), "replug": (Replug, 0.1), "contrastive": (Contrastive, 0.05), "simcse": (SimCSE, 0.05)}
# Revela with one thing changed; every arm reads as many tokens in all. The settings are the demo's where an arm says nothing
ABLATIONS = {
    "v-norm unit": dict(value_norm="unit"), "v-norm none": dict(value_norm="none"), "temperature 0.1": dict(temperature=0.1), "temperature 0.001": dict(temperature=0.001),
    "frozen LM": dict(freeze_lm=True), "strategy random": dict(strategy="random"), "strategy bm25": dict(strategy="bm25"), "strategy document": dict(run_length=16),
    "groups of 4": dict(group_size=4, groups_a_step=4), "chunks of 40 words": dict(max_words=40, max_length=112, fewer_steps=2), "temperature 1": dict(temperature=1.0),
    "groups of 32": dict(group_size=32, fewer_steps=2), "chunks of 10 words": dict(max_words=10, max_length=28, groups_a_step=2),
    "strategy cluster": dict(strategy="cluster"), "strategy remine": dict(strategy="remine"), "strategy mixture": dict(strategy="document:0.5,bm25:0.5"), "strategy demo": dict(), # the demo's own, as a control on the same documents
}
POOL = 20_000 # chunks from which the groups of one seed are made
REFERENCES = ("untrained", "untrained_eos", "bm25") # nothing to train, so one seed
DOCUMENTS, QUERIES = 1000, 300 # at most, of every task


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


def measure(runs, found, sizes):
    "Figures of one system on every task, query by query."
    out = {}
    for name, (corpus, queries, qrels) in found.items():
        scores = score_queries(runs[name], qrels)
        mean = {m: sum(s[m] for s in scores.values()) / len(scores) for m in ("ndcg@10", "recall@100", "mrr@10")}
        out[name] = mean | {"queries": len(queries), "documents": len(corpus), "of_documents": sizes[name], "per_query": [round(scores[q]["ndcg@10"], 4) for q in qrels]}
        log.info("  %s nDCG@10 %.4f (%d queries, %d of %d documents)", name, mean["ndcg@10"], len(queries), len(corpus), sizes[name])
    return {"tasks": out, "versions": versions()}


def training_documents(seed, queries, folder=None):
    "Functions of the installed packages; kept in a folder and read from there if one is given, for an environment may change between two runs."
    path = folder and folder / f"documents_{seed}"
    if path and path.exists(): return load_from_disk(path)
    documents = function_documents(sample_documents(load_corpus("python:packages"), queries, seed=seed))
    if path: documents.save_to_disk(path)
    return documents


def fingerprint(documents):
    "Of all texts: `python:packages` is what is installed, so two environments train on different documents."
    return hashlib.sha256(json.dumps(documents["text"][:]).encode()).hexdigest()[:12]


def embedded_groups(chunks, strategy, retriever, seed, group_size, facts):
    "Groups by a retriever's vectors of all chunks; what they took goes into `facts`."
    start, texts = time.time(), chunks["text"][:]
    documents = np.unique(chunks["doc_id"][:], return_inverse=True)[1]
    with counting_reads(retriever.encoder) as read: vectors = retriever.encode_passages(texts, progress=False).numpy()
    with tqdm(disable=True) as bar: made = group_by(strategy, documents, group_size, 0, seed, None, lambda: vectors, bar)
    off = ~np.eye(group_size, dtype=bool)
    same = lambda of: round(float(np.mean([(of[g][:, None] == of[g])[off].mean() for g in made])), 4)
    facts |= {"grouping_seconds": round(time.time() - start, 1), "grouping_rows": read["rows"], "grouping_tokens": read["tokens"],
              "own_document": same(documents), "copies": same(np.unique(texts, return_inverse=True)[1])}
    ids = chunks["_id"][:]
    return Dataset.from_dict({"ids": [[ids[i] for i in g] for g in made], "texts": [[texts[i] for i in g] for g in made]}, features=GROUP_FEATURES)


def mixed_groups(chunks, shares, seed, **options):
    "Every document dealt to one strategy, as `revela prepare` deals them."
    documents, rng = np.unique(chunks["doc_id"][:], return_inverse=True)[1], np.random.default_rng(seed)
    part = deal_documents(shares, documents.max() + 1, rng)[documents]
    made = [make_groups(chunks.select(np.flatnonzero(part == k)), strategy=strategy, seed=seed, **options) for k, strategy in enumerate(shares)]
    return concatenate_datasets(made).shuffle(seed)


def groups_of(documents, seed, max_words=CHUNK_WORDS, strategy="document", group_size=16, run_length=2, retriever=None, facts=None):
    "The demo's groups, or others of the same documents."
    chunks = chunk_corpus(documents, max_words=max_words)
    chunks = chunks.select(range(min(POOL * CHUNK_WORDS // max_words, len(chunks))))
    if strategy in EMBEDDING: return embedded_groups(chunks, strategy, retriever, seed, group_size, facts)
    shares, options = parse_strategy(strategy), dict(group_size=group_size, run_length=run_length)
    return mixed_groups(chunks, shares, seed, **options) if len(shares) > 1 else make_groups(chunks, strategy=strategy, seed=seed, **options)


class Regrouped(torch.utils.data.Dataset):
    """Groups that are made anew once, when the first `fetches` have been handed out. The trainer fetches one step ahead, so steps 1 to
    `fetches` read the old groups, all later ones the new, and the retriever that makes these has done `fetches` - 1 steps."""
    def __init__(self, groups, fetches, regroup): self.groups, self.left, self.regroup = groups, fetches, regroup
    def __len__(self): return len(self.groups)
    def __getitem__(self, n):
        if self.left == 0:
            new = self.regroup()
            assert len(new) >= len(self.groups), "the order of the groups was drawn for the old ones"
            self.groups = new
        self.left -= 1
        return self.groups[n]


def train(kind, documents, seed, steps, bf16, temperature=0.02, value_norm="rescaled", freeze_lm=False, max_length=TRAIN_LENGTH, groups_a_step=1, fewer_steps=1, strategy="document", **grouping):
    "A trained retriever, and what its training read and took."
    set_seed(seed)
    model, facts, steps = demo_model(backbone_folder(), kind), {}, steps // fewer_steps
    model.temperature, model.value_norm = temperature, value_norm
    if freeze_lm: model.lm.requires_grad_(False)
    def make(strategy):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return groups_of(documents, seed, strategy=strategy, retriever=model.retriever, facts=facts, **grouping)
    # cluster asks the untrained retriever; remine begins with the demo's groups and asks its own retriever half way
    groups = Regrouped(make("document"), steps // 2, lambda: make("remine")) if strategy == "remine" else make(strategy)
    set_seed(seed) # whatever the grouping drew
    start = time.time()
    with tempfile.TemporaryDirectory() as folder, counting_reads(model.lm) as lm, counting_reads(model.retriever.encoder) as embedded:
        history = train_demo(model, groups, steps, seed, folder, max_length, bf16=bf16, per_device_train_batch_size=groups_a_step)
    if strategy == "remine": # what was read between two steps is told apart
        for unit in ("rows", "tokens"): embedded[unit] -= facts[f"grouping_{unit}"]
    return model.retriever, facts | {"trained_on": fingerprint(documents), "train_seconds": round(time.time() - start, 1), "lm_rows": lm["rows"], "lm_tokens": lm["tokens"], "retriever_rows": embedded["rows"],
                                     "retriever_tokens": embedded["tokens"], "temperature": temperature, "log": [{k: r[k] for k in ("step", "loss", "gain")} for r in history]}


def store(records, out):
    "Write all records in one step."
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(json.dumps(records, indent=None, separators=(",", ":")).replace('{"method"', '\n{"method"') + "\n", encoding="utf-8")
    os.replace(partial, out)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of one group")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="train Revela with one thing changed, instead of the rivals")
    parser.add_argument("--methods", nargs="+", help="only these: " + ", ".join([*REFERENCES, *METHODS]) + "; with --ablations: " + ", ".join(ABLATIONS))
    parser.add_argument("--bf16", action="store_true", help="train and encode in bf16 (fast on processors with AMX and on GPUs, very slow on others)")
    parser.add_argument("--data", default=NBS.parent.parent / "shared" / "data", help="holds cosqa, scifact, squad in BEIR's layout")
    parser.add_argument("--documents", type=Path, help="keep what is trained on in this folder, and read it from there the next time")
    parser.add_argument("--out", type=Path, help="for rehearsals; by default nbs/results/results.json or ablations.json")
    args = parser.parse_args()
    known = [*ABLATIONS] if args.ablations else [*REFERENCES, *METHODS]
    args.methods, args.out = args.methods or known, args.out or NBS / "results" / ("ablations.json" if args.ablations else "results.json")
    if unknown := set(args.methods) - set(known): parser.error(f"no method {sorted(unknown)[0]!r}: there are {', '.join(known)}")
    return args


def main():
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    records = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    wanted = {"precision": "bf16" if args.bf16 else "float32", "documents": DOCUMENTS, "queries": QUERIES}
    for r in records:
        if {k: r.get(k) for k in wanted} != wanted or r["steps"] not in (0, args.steps): raise SystemExit(f"{args.out} holds runs of other settings ({r['method']}: {r['steps']} steps, {[r.get(k) for k in wanted]}): move it away")
    done = {(r["method"], r["seed"]) for r in records}
    found, sizes = tasks(args.data)
    documents_of = functools.cache(lambda seed: training_documents(seed, found["docstring"][1], args.documents)) # the same for every method
    # seed by seed, so that an interrupted run has all methods of the first seeds
    for seed, method in [(s, m) for s in args.seeds for m in args.methods]:
        if (method, seed) in done or (method in REFERENCES and seed != args.seeds[0]): continue
        log.info("%s, seed %d", method, seed)
        facts = {"method": method, "seed": seed, "steps": 0 if method in REFERENCES else args.steps, "threads": torch.get_num_threads(), "date": str(datetime.date.today())} | wanted
        if method == "bm25": run_of = bm25_run
        else:
            kind, changes = (Revela, ABLATIONS[method]) if method in ABLATIONS else (METHODS[method][0], {"temperature": METHODS[method][1]}) if method in METHODS else (None, {})
            if kind: retriever, cost = train(kind, documents_of(seed), seed, args.steps, args.bf16, **changes); facts |= cost
            else: retriever = Retriever.from_pretrained(backbone_folder(), pooling="eos" if method.endswith("eos") else "mean", max_length=MAX_LENGTH)
            run_of = functools.partial(dense_run, retriever)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16): runs = {name: run_of(corpus, queries) for name, (corpus, queries, _) in found.items()}
        records.append(facts | measure(runs, found, sizes))
        if method == "revela": # fused with BM25 by ranks, which needs no weight
            fused = {name: fuse_ranks([runs[name], bm25_run(corpus, queries)]) for name, (corpus, queries, _) in found.items()}
            records.append(facts | {"method": "hybrid"} | measure(fused, found, sizes))
        store(records, args.out)


if __name__ == "__main__": main()
