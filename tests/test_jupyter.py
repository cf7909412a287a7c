"""Two chapters as a reader runs them: in a real Jupyter kernel, top to bottom, without nbdev. The second takes over a minute: only where REVELA_SLOW is set."""
import os
import re
from pathlib import Path

import pytest

for needed in ("nbclient", "ipykernel", "nbformat"): pytest.importorskip(needed, reason=f"needs {needed}, which comes with jupyterlab")
import nbclient
import nbformat

ROOT = Path(__file__).parents[1]
NOT_RUN = re.compile(r"^#\| *(?:slow|cuda|eval: *false)\b", re.M)        # flagged cells, the install cell for Colab among them


@pytest.fixture
def kernel(monkeypatch):
    "Run a notebook in a fresh kernel, beside the chapters and on this checkout's package."
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)                      # readers have none: the kernel draws into the page
    def run(notebook):
        for cell in notebook.cells:
            if cell.cell_type == "code" and NOT_RUN.search(cell.source): cell.metadata["tags"] = ["not-run"]
        return nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", skip_cells_with_tag="not-run", resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    return run


def pictures(cell): return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


slow = pytest.mark.skipif(not os.environ.get("REVELA_SLOW"), reason="over a minute on two cores: REVELA_SLOW=1")


@pytest.mark.parametrize("name", ["00_tour", pytest.param("04_attention", marks=slow)])
def test_a_chapter_runs_in_jupyter(kernel, name):
    stored, fresh = (nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4) for _ in range(2))
    kernel(fresh)                                                        # raises where a cell does
    run = [(i, old, new) for i, (old, new) in enumerate(zip(stored.cells, fresh.cells)) if old.cell_type == "code" and not NOT_RUN.search(old.source) and old.source]
    assert len(run) > 8 and all(new.execution_count for _, _, new in run)
    assert not [i for i, old, new in run if pictures(old) != pictures(new)], "cells whose pictures are not those that are stored"
    assert sum(pictures(new) for _, _, new in run) > 2


def test_the_kernel_stops_at_a_fault(kernel):
    cells = [nbformat.v4.new_code_cell("#| eval: false\nno_such_name"), nbformat.v4.new_code_cell("import revela_nb; print(revela_nb.__file__)"), nbformat.v4.new_code_cell("1 / 0")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"): kernel(notebook := nbformat.v4.new_notebook(cells=cells))
    assert notebook.cells[1].outputs[0].text.strip() == str(ROOT / "revela_nb" / "__init__.py")
