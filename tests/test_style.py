"""The house style's sizes, the width of code, cell ids, pictures in words, and spelling."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {p.stem: json.loads(p.read_text(encoding="utf-8"))["cells"] for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))}
MOST = {"cells": 70, "code lines": 400, "words": 1800, "long exported cells": 0, "lines over 135": 0, "plots without fig-alt": 0}
LEAST = {"cells": 40, "code lines": 250, "words": 1000}
LINES = {"module": 60, "other": 25}             # of one exported cell: an nn.Module, and all else

# Chapters below a lower limit. One that has said all is not filled up.
RECORD = "reads recorded runs: tables and plots, nothing to build"
ONE_IDEA = "one idea, said; filling it up would not teach more"
SHORT = {
    "00_tour": ONE_IDEA,
    "01_corpus": ONE_IDEA,
    "01c_reading": ONE_IDEA,
    "04c_streams": ONE_IDEA,
    "04d_loss": ONE_IDEA,
    "08b_bm25": ONE_IDEA,
    "09b_grouping": ONE_IDEA,
    "09c_copies": ONE_IDEA,
    "10b_prepared": ONE_IDEA,
    "13_export": ONE_IDEA,
    "14b_sweep": ONE_IDEA,
    "15_serve": ONE_IDEA,
    "18c_asking": ONE_IDEA,
    "18d_options": ONE_IDEA,
    "20_quick_run": RECORD,
    "21_results": RECORD,
    "22_strategies": RECORD,
    "23_scaling": RECORD,
    "24_speed": RECORD,
    "30_backbone": RECORD,
}


def source(cell): return "".join(cell["source"])
def counted(cell): return [line for line in source(cell).splitlines() if line.strip() and not line.strip().startswith("#|")]


def kind(cell): return "module" if re.search(r"^class \w+\(.*Module\)", source(cell), re.M) else "other"


def sizes(cells):
    "What MOST and LEAST speak of. Hidden cells count too, the install cell for Colab does not."
    cells = [c for c in cells if "google.colab" not in source(c)]
    code = [c for c in cells if c["cell_type"] == "code"]
    exported = [c for c in code if re.search(r"^#\| *exports?\b", source(c), re.M)]
    return {"cells": len(cells), "code lines": sum(len(counted(c)) for c in code),
            "words": sum(len(source(c).split()) for c in cells if c["cell_type"] == "markdown"),
            "long exported cells": sum(len(counted(c)) > LINES[kind(c)] for c in exported),
            "lines over 135": sum(len(line) > 135 and not line.startswith("#|") for c in code for line in source(c).splitlines()),
            "plots without fig-alt": sum(any("image/png" in o.get("data", {}) for o in c["outputs"]) and not re.search(r"^#\| *fig-alt:", source(c), re.M) for c in code)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_chapter_is_over_the_limits(name):
    found = sizes(NOTEBOOKS[name])
    assert not {k: (found[k], most) for k, most in MOST.items() if found[k] > most}, "what is: (found, allowed)"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_short_chapters_are_short_for_a_reason(name):
    found = sizes(NOTEBOOKS[name])
    assert name in SHORT or not {k: (found[k], least) for k, least in LEAST.items() if found[k] < least}, "what is: (found, least)"


def test_exceptions_are_needed_and_have_reasons():
    assert set(SHORT) <= set(NOTEBOOKS), "exceptions for chapters that are gone"
    idle = [name for name in SHORT if all(sizes(NOTEBOOKS[name])[k] >= least for k, least in LEAST.items())]
    assert not idle, f"no longer needed, take them out: {idle}"
    assert all(len(why) > 20 for why in SHORT.values())


def test_the_measure_itself():
    cell = lambda kind, text, **more: {"cell_type": kind, "source": [text], "outputs": [], **more}
    png = [{"output_type": "display_data", "data": {"image/png": ""}}]
    cells = [cell("markdown", "three words here"), cell("code", "#| export\ndef f():\n" + "    x = 1\n\n"*25), cell("code", "#| export\nclass A(nn.Module):\n" + "    x = 1\n"*59),
             cell("code", "#| hide\n" + "x"*136, outputs=png), cell("code", '#| fig-alt: "a line"\nplot()', outputs=png)]
    assert sizes(cells) == {"cells": 5, "code lines": 26 + 60 + 1 + 1, "words": 3, "long exported cells": 1, "lines over 135": 1, "plots without fig-alt": 1}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cell_ids_are_unique(name):
    ids = [c["id"] for c in NOTEBOOKS[name]]
    assert len(ids) == len(set(ids)), sorted({i for i in ids if ids.count(i) > 1})


@pytest.mark.parametrize("name", [n for n in NOTEBOOKS if n != "00_tour"])
def test_colab_installs_in_one_cell(name):
    "The first code cell of readers in Colab: guarded, so that it does nothing elsewhere. The tour needs nothing but torch."
    first = next(c for c in NOTEBOOKS[name] if c["cell_type"] == "code" and not source(c).startswith("#| default_exp"))
    assert re.match(r"#\| hide\n#\| eval: false\n", source(first)) and 'if "google.colab" in sys.modules:\n' in source(first)
    assert re.search(r"https://github\.com/(\S+)", source(first))[1] == "revela-nb/revela_nb"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_title_leads_to_colab(name):
    title = source(next(c for c in NOTEBOOKS[name] if c["cell_type"] == "markdown"))
    assert title.startswith("# ") and title.endswith(f"\n\n[Open&nbsp;in&nbsp;Colab](https://colab.research.google.com/github/revela-nb/revela_nb/blob/main/nbs/{name}.ipynb)")


def test_spelling(tmp_path):
    "Notebooks (prose and code), the site's pages, README and the like. Words of ours that codespell does not know, and misspellings on purpose, are in --ignore-words-list."
    pytest.importorskip("codespell_lib", reason="needs codespell: pip install -e '.[dev]'")
    for name, cells in NOTEBOOKS.items(): (tmp_path / f"{name}.txt").write_text("\n\n".join(map(source, cells)), encoding="utf-8")
    (tmp_path / "wrong.txt").write_text("A sentance with teh usual faults.")
    files = [*tmp_path.glob("*.txt"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "nbs").glob("*.py")]
    done = subprocess.run([sys.executable, "-m", "codespell_lib", "--ignore-words-list", "docment,docments,caf,heterogenous", *files], capture_output=True, text=True)
    faults = [line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines()]
    assert len([f for f in faults if f.startswith("wrong.txt")]) == 2, "codespell itself finds nothing"
    assert not [f for f in faults if not f.startswith("wrong.txt")]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_prose_stands_before_every_exported_cell(name):
    "Words or a cell that shows something, never two exported cells in a row: STYLE wants the why before each."
    exported = [bool(re.search(r"^#\| *exports?\b", source(c), re.M)) for c in NOTEBOOKS[name]]
    bare = [i for i, (before, here) in enumerate(zip(exported, exported[1:]), 1) if before and here]
    assert not bare, f"exported cells without prose before them: {bare}"
