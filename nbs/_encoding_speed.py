"""Encoding speed beside SentenceTransformer.encode: the same backbone, the same texts, in turns. `python nbs/_encoding_speed.py FOLDER` adds a row to results/encoding.json."""
import argparse, json, os, platform, tempfile, time
from pathlib import Path

import sentence_transformers, torch
from sentence_transformers import SentenceTransformer

from revela_nb.demo import backbone_folder
from revela_nb.evaluation import load_beir, passage_texts
from revela_nb.retriever import Retriever

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("data", help="a BEIR folder; its first passages are encoded")
options.add_argument("--texts", type=int, default=500)
options.add_argument("--rounds", type=int, default=3)
args = options.parse_args()
texts = passage_texts(load_beir(args.data)[0])[:args.texts]
ours = Retriever.from_pretrained(backbone_folder(), pooling="mean")
seconds = {"ours": [], "sentence-transformers": []}
with tempfile.TemporaryDirectory() as folder:
    ours.export_sentence_transformer(folder)
    theirs = SentenceTransformer(folder, device="cpu")
    for _ in range(args.rounds + 1): # the first round only warms up
        start = time.perf_counter(); a = ours.encode_passages(texts, batch_size=32, progress=False); seconds["ours"].append(time.perf_counter() - start)
        start = time.perf_counter(); b = theirs.encode_document(texts, batch_size=32, show_progress_bar=False); seconds["sentence-transformers"].append(time.perf_counter() - start)
best = {name: min(times[1:]) for name, times in seconds.items()}
row = {"texts": len(texts), "ratio": round(best["sentence-transformers"] / best["ours"], 3), "texts_per_second": round(len(texts) / best["ours"], 1), "largest_difference": float((a - torch.from_numpy(b)).abs().max()),
       "data": Path(args.data).name, "threads": torch.get_num_threads(), "versions": {"torch": torch.__version__, "sentence-transformers": sentence_transformers.__version__}, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
       "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python nbs/_encoding_speed.py {Path(args.data).name} --texts {args.texts} --rounds {args.rounds}", "date": time.strftime("%Y-%m-%d")}
row["seconds"] = {name: [round(t, 2) for t in times[1:]] for name, times in seconds.items()}
print(row)
path = Path(__file__).with_name("results") / "encoding.json"
rows = [r for r in (json.loads(path.read_text()) if path.exists() else []) if r["data"] != row["data"]] + [row]
path.write_text(json.dumps(rows, indent=1) + "\n")
