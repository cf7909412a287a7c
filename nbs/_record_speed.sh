#!/bin/sh
# All CPU records that 24_speed reads, one after the other; nothing else may run.  usage: sh nbs/_record_speed.sh   (about an hour on two cores)
# Then: python nbs/_refresh.py nbs/24_speed.ipynb; python nbs/_refresh.py nbs/14_bench.ipynb nbs/14b_sweep.ipynb --flags slow
set -e
cd "$(dirname "$0")/.."
out=$(mktemp -d)
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg OMP_NUM_THREADS=2 PYTHONPATH="$PWD"
python nbs/_parts.py                                                                # results/parts.json, 3 minutes
python -m revela_nb.cli bench --out "$out/bench"                                    # 7 minutes
cp "$out/bench/bench.json" nbs/results/bench.json
python -m revela_nb.cli bench --sweep --repeats 1 --out "$out/sweep"                # 15 minutes, one timed step a case
cp "$out/sweep/bench.json" nbs/results/bench_sweep.json
python nbs/_kernels.py                                                              # results/kernels.json, 1 minute
python nbs/_large.py --threads 2                                                    # results/large.json, 10 to 20 minutes
rm -r "$out"
