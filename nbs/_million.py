"""One million clustered vectors of 576 numbers: time, memory and recall. `python nbs/_million.py ivfsq` adds a row to results/index.json."""
import json, os, platform, resource, sys, time
from pathlib import Path

import faiss
import numpy as np

from revela_nb.index import index_recipe

N, D, BLOCK, kind = 1_000_000, 576, 50_000, sys.argv[1]
CENTRES = np.random.default_rng(1).standard_normal((2000, D), np.float32)

def make_vectors(seed, n):
    draw = np.random.default_rng(seed)
    x = CENTRES[draw.integers(0, 2000, n)] + 0.7 * draw.standard_normal((n, D), np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)

start = time.perf_counter()
index = faiss.index_factory(D, index_recipe(kind, N, D), faiss.METRIC_INNER_PRODUCT)
index.cp.niter = 6
if kind == "ivfpq": index.do_polysemous_training = False # as build_index does
index.train(make_vectors(1000, 40_000))
train = time.perf_counter() - start
for block in range(N // BLOCK): index.add(make_vectors(block, BLOCK))
index.nprobe = max(1, index.nlist // 32) # as build_index sets it
build = time.perf_counter() - start
queries = make_vectors(2000, 200) # of the same clusters, not in the index
start = time.perf_counter()
for i in range(len(queries)): index.search(queries[i:i + 1], 10)
query = (time.perf_counter() - start) / len(queries)
index.reset()
subset = np.concatenate([make_vectors(block, BLOCK) for block in range(2)])
index.add(subset)
true, found = faiss.knn(queries, subset, 10, metric=faiss.METRIC_INNER_PRODUCT)[1], index.search(queries, 10)[1]
recall = np.mean([len(set(t) & set(f)) / 10 for t, f in zip(true.tolist(), found.tolist())])
row = {"kind": kind, "recipe": index_recipe(kind, N, D), "vectors": N, "dim": D, "train_seconds": round(train, 1), "build_seconds": round(build, 1), "query_ms": round(1000 * query, 2),
       "recall@10_on_100k": round(float(recall), 4), "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
       "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')} python nbs/_million.py {kind}", "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
path = Path(__file__).with_name("results") / "index.json"
rows = [r for r in (json.loads(path.read_text()) if path.exists() else []) if r["kind"] != kind] + [row]
path.write_text(json.dumps(rows, indent=1) + "\n")
