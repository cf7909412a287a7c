"""Stored outputs are what a run gives: fast chapters here, all of them by `make rerun`."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("execnb", "nbdev"): pytest.importorskip(needed, reason=f"needs {needed}: pip install -e '.[dev]'")
import nbformat

ROOT = Path(__file__).parents[1]
FAST = ["00_tour", "20_quick_run", "23_scaling"]


def check(*paths):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, ROOT / "nbs" / "_refresh.py", *paths, "--check"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_fast_chapters_are_stored_as_they_run():
    done = check(*[ROOT / "nbs" / f"{name}.ipynb" for name in FAST])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("is as stored") == len(FAST)


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs))


def test_what_counts_as_a_difference(tmp_path):
    stream = lambda text: nbformat.v4.new_output("stream", name="stdout", text=text)
    picture = nbformat.v4.new_output("display_data", {"image/png": "bm90IGEgcGljdHVyZQ==", "text/plain": "<Figure>"})
    draw = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(1, 1))\nplt.show()"
    cells = [code("print(1 + 1)", stream("2\n")), code("print(1 + 2)", stream("4\n")), code(draw, picture), code("3 * 3"),
             code("#| timing\nprint('a ratio of 7')", stream("a ratio of 6\n")), code("print('12.5 s, 3 GB')", stream("9 s, 2.1 GB\n")), code("#| eval: false\nprint(1)", stream("5\n"))]
    path = tmp_path / "00_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    before, done = path.read_bytes(), check(path)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stdout.splitlines() if ", cell " in line]
    assert said == [f"00_small.ipynb, cell {i}:" for i in (1, 2, 3)], done.stdout
    assert "    -4\n    +3\n" in done.stdout and "00_small.ipynb 3 outputs differ" in done.stdout
    assert path.read_bytes() == before
