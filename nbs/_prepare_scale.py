"""What `revela prepare` costs against the size of a corpus; fills results/prepare.json, one run after another.

usage: python nbs/_prepare_scale.py [--sizes 10000 50000 200000 1000000] [--strategies document bm25] [--near 0.8] [--parts 1]

The corpus is made here: copies of ../shared/data/devdocs_python in which every copy after the first puts its own number behind half of the words of four
letters or more, so that copies share half of their words and none is a near copy of another. A run has a process of its own, so that its peak memory is its own."""
import argparse
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "shared/data/devdocs_python/training_corpus.jsonl.gz"
STAGES = ("read_chunks", "pick_chunks", "group_chunks", "write_shards")


def make_corpus(path, n_chunks):
    "Write JSON lines that give about `n_chunks` chunks of at most 120 words."
    if path.exists(): return
    rows, made, copy = [json.loads(line) for line in gzip.open(SOURCE, "rt")], 0, 0
    with open(path.with_suffix(".partial"), "w") as file:
        while made < n_chunks:
            names = {}
            def rename(match):
                word = match.group()
                if word not in names: names[word] = f"{word}{copy}" if copy and zlib.crc32(f"{copy} {word.lower()}".encode()) % 2 else word
                return names[word]
            for row in rows:
                text = re.sub(r"[A-Za-z]{4,}", rename, row["text"])
                file.write(json.dumps({"_id": f"{row['_id']}-{copy}", "title": row["title"], "text": text}) + "\n")
                made += len(text.split()) / 111
                if made >= n_chunks: break
            copy += 1
    path.with_suffix(".partial").rename(path)


def peak_mib():
    "The most memory that this process has held so far."
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def cpu_seconds():
    "Of this process and of its children that have ended, on all cores."
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def measure_run(source, out, strategy, near):
    "Prepare once; print a record as JSON."
    import revela_nb.prepare as prepare
    stages, start = {}, peak_mib()
    def timed(stage):
        def call(*args, **options):
            wall, cpu = time.perf_counter(), cpu_seconds()
            result = stage(*args, **options)
            stages[stage.__name__.split("_")[0]] = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1), "peak_mib": peak_mib()}
            return result
        return call
    for name in STAGES: setattr(prepare, name, timed(getattr(prepare, name)))
    wall, cpu = time.perf_counter(), cpu_seconds()
    counts = prepare.prepare_corpus(prepare.PrepareOptions(source, strategy=strategy, near=near), out)["counts"]
    print(json.dumps({"strategy": strategy, "near": near, "chunks_cut": counts["chunks cut"], "chunks_kept": counts["chunks kept"], "exact": counts["exact copies"],
                      "near_copies": counts["near copies"], "groups": counts["groups"], "seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(cpu_seconds() - cpu, 1),
                      "peak_mib": peak_mib(), "start_mib": start, "load": round(os.getloadavg()[0], 1), "stages": stages}))


def store(record, path):
    "One more run in the file of results; a run of the same strategy, size and `near` is replaced."
    results = json.loads(path.read_text()) if path.exists() else {"runs": []}
    same = lambda run: all(run[key] == record[key] for key in ("strategy", "near", "chunks_cut"))
    results["runs"] = sorted([run for run in results["runs"] if not same(run)] + [record], key=lambda run: (run["strategy"], -run["near"], run["chunks_cut"]))
    path.with_suffix(".partial").write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    path.with_suffix(".partial").rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_000_000])
    parser.add_argument("--strategies", nargs="+", default=["document", "bm25"])
    parser.add_argument("--near", type=float, default=0.8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "prepare_scale"), help="keeps the corpora")
    parser.add_argument("--results", type=Path, default=HERE / "results/prepare.json")
    parser.add_argument("--run", nargs=4, metavar=("SOURCE", "OUT", "STRATEGY", "NEAR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        measure_run(args.run[0], args.run[1], args.run[2], float(args.run[3]))
        sys.exit()
    args.folder.mkdir(exist_ok=True)
    for strategy in args.strategies:
        for size in args.sizes:
            source, out = args.folder / f"corpus-{size}.jsonl", args.folder / f"groups-{os.getpid()}"
            make_corpus(source, size)
            done = subprocess.run([sys.executable, __file__, "--run", str(source), str(out), strategy, str(args.near)], stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout.strip(), flush=True)
            store(json.loads(done.stdout), args.results)
            shutil.rmtree(out)
