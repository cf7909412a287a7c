"""Stored outputs are what a run gives: fast chapters here, all of them by `make rerun`. And what counts as a difference."""
import base64
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("execnb", "nbdev"): pytest.importorskip(needed, reason=f"needs {needed}: pip install -e '.[dev]'")
import nbformat
from PIL import Image, PngImagePlugin

ROOT = Path(__file__).parents[1]
FAST = ["00_tour", "20_quick_run", "23_scaling"]
spec = importlib.util.spec_from_file_location("refresh_notebooks", ROOT / "nbs" / "_refresh.py")
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)


def run(*args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    return subprocess.run([sys.executable, ROOT / "nbs" / "_refresh.py", *args], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


def test_fast_chapters_are_stored_as_they_run():
    done = run(*[ROOT / "nbs" / f"{name}.ipynb" for name in FAST], "--check", "--jobs", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.count("is as stored") == len(FAST)


def code(source, *outputs): return nbformat.v4.new_code_cell(source, outputs=list(outputs))
def stream(text): return nbformat.v4.new_output("stream", name="stdout", text=text)


def picture(grey=255, note="", size=(2, 2)):
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("Software", note)
    Image.new("RGB", size, (grey, 0, 0)).save(file, "PNG", pnginfo=info)
    return nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "<Figure>"})


def same(old, new, source="f()"): return not list(rules.differences([code(source, *old)], [code(source, *new)]))
def same_text(old, new, source="f()"): return same([stream(old)], [stream(new)], source)


@pytest.mark.parametrize("old, new", [("4", "3"), ("4", "4 4"), ("loss 3.9379", "loss 3.9380"), ("1.0 rows", "2.0 rows"), ("True", "False"), ("4", "")])
def test_texts_are_compared_word_by_word(old, new):
    assert same_text(old, old) and not same_text(old, new)


@pytest.mark.parametrize("old, new", [("12.5 s, 3 GB", "9 s, 2.1 GB"), ("950 µs a query", "1.1 ms a query"), ("made 2026-11-23", "made 2026-12-01"),
                                      ("<A at 0x7f0000000000>", "<A at 0x7fffffffffff>"), ("87 tokens/s", "1,140 tokens/s")])
def test_times_sizes_dates_and_addresses_may_vary(old, new):
    assert same_text(old, new) and not same_text(old, new.replace("s", "z").replace("made", "done").replace("A at", "B at"))


@pytest.mark.parametrize("old, new, equal", [
    ("7.5e-08", "4.5e-08", True), ("5.960464477539063e-08", "3e-08", True), ("-1e-07", "2e-12", True), ("9.5e-07", "1.2e-06", True), ("0.0e+00", "6.0e-08", True),
    ("1e-08", "1e-03", False), ("7.5e-08", "7.5e-05", False), ("1.9e-06", "2.1e-06", False), ("3e-08", "3e+08", False), ("3.4e-01", "4.5e-01", False),
    ("0.0", "7.5e-08", False), ("1e-08", "1.2", False), ("x1e-08", "x2e-08", False), ("21e-06", "11e-06", False)])
def test_rounding_is_no_difference_but_an_order_of_magnitude_is(old, new, equal):
    assert same_text(f"largest difference {old}", f"largest difference {new}") == equal


@pytest.mark.parametrize("source", ["#| timing\nf()", "start = time.perf_counter()", "timeit.timeit(f)", "psutil.Process()", "resource.getrusage(0)"])
def test_cells_that_measure_are_compared_by_their_words(source):
    assert same_text("ours    9.5   1.0", "ours   10.25  0.9", source) and not same_text("ours    9.5   1.0", "ours   10.25  0.9")
    assert not same_text("ours 9.5", "theirs 9.5", source) and not same_text("ours 9.5", "ours 9.5 9.5", source)
    assert same([picture(1)], [picture(9)], source) and not same([picture(1)], [picture(1), picture(1)], source)


def test_words_that_only_look_like_measuring_do_not_count():
    assert not same_text("1", "2", "modules = 'timeit trace'") and not same_text("1", "2", "timing = 3")


def test_pictures_are_compared_by_their_pixels():
    assert same([picture(note="matplotlib 3.9")], [picture(note="matplotlib 3.11")])
    assert not same([picture(255)], [picture(254)]) and not same([picture()], [picture(size=(1, 4))]) and not same([picture()], [])


SMALL = [("print(1 + 1)", stream("2\n")), ("print(1 + 2)", stream("4\n")), ("import matplotlib.pyplot as plt\nfig, ax = plt.subplots(figsize=(1, 1))\nplt.show()", picture()),
         ("3 * 3",), ("#| timing\nprint('a ratio of 7')", stream("a ratio of 6\n")), ("print('12.5 s, 3 GB')", stream("9 s, 2.1 GB\n")),
         ("#| eval: false\nprint(1)", stream("5\n")), ("print('worst 7.5e-08')", stream("worst 4.5e-08\n"))]


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "00_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[code(*cell) for cell in SMALL]), path)
    return path


def stored(path): return ["".join(o.get("text", "picture") for o in cell.outputs) for cell in nbformat.read(path, 4).cells]


def test_check_says_what_differs_and_writes_nothing(small):
    before, done = small.read_bytes(), run(small, "--check")
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stdout.splitlines() if ", cell " in line]
    assert said == [f"00_small.ipynb, cell {i}:" for i in (1, 2, 3)], done.stdout
    assert "    -4\n    +3\n" in done.stdout and "00_small.ipynb 3 outputs differ" in done.stdout
    assert small.read_bytes() == before


def test_a_refresh_stores_what_check_finds_and_nothing_else(small):
    before, done = stored(small), run(small)
    assert done.returncode == 0 and "00_small.ipynb stored cells 1, 2, 3" in done.stdout, done.stdout + done.stderr
    after = stored(small)
    assert after[1] == "3\n" and [i for i, (a, b) in enumerate(zip(before, after)) if a != b] == [1, 3]
    bytes_after, again = small.read_bytes(), run(small)
    assert "is as stored" in again.stdout and small.read_bytes() == bytes_after, "a second run changes the file"
    timed = run(small, "--timings")
    assert "stored cells 4 " in timed.stdout and stored(small)[4] == "a ratio of 7\n" and stored(small)[5] == "9 s, 2.1 GB\n"


def test_a_chapter_that_raises_or_takes_too_long_is_a_fault_and_the_others_still_run(tmp_path):
    for name, source in (("00_bad", "1 / 0"), ("01_good", "2")): nbformat.write(nbformat.v4.new_notebook(cells=[code(source)]), tmp_path / f"{name}.ipynb")
    before = (tmp_path / "00_bad.ipynb").read_bytes()
    done = run(tmp_path / "00_bad.ipynb", tmp_path / "01_good.ipynb", "--jobs", "2")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout and "01_good.ipynb stored cells 0" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "00_bad.ipynb").read_bytes() == before
    late, quick = (run(tmp_path / "01_good.ipynb", "--most", most) for most in ("0", "100"))
    assert late.returncode == 1 and "more than 0 s" in late.stdout and quick.returncode == 0
