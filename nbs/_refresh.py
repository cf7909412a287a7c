"""Re-execute notebooks and store what differs.  usage: python nbs/_refresh.py [NOTEBOOK ...] [--flags slow] [--timings] [--jobs N] [--check]

Runs all notebooks, or those named. Skips what nbdev_test skips (flags in settings.ini's tst_flags, `#| eval: false`); skipped cells keep the
outputs they have. A notebook that raises is not written. Progress bars and warnings on stderr are not stored.

Stored are only the outputs that differ; a run of what is current leaves `git diff` empty. What does not count as a difference:
- numbers with a unit of time, of bytes or of speed, dates, addresses of objects;
- numbers below 2e-6 in exponent form, or zero in it: 7.5e-08 against 4.5e-08 is another processor's rounding, 1e-3 against 1e-8 is a fault;
- in cells that measure time or memory (`#| timing` as a directive, or `perf_counter`, `timeit.`, `psutil` or `getrusage` in their source) every number,
  spaces, and what a picture shows: there only the words and the number of pictures count. `--timings` stores these cells whatever they say.
Pictures elsewhere are compared by a hash of their pixels.

`--check` writes nothing: it prints which outputs differ from the stored ones, and ends with 1 if any does. `--most S` ends with 1, too, if a notebook
runs for more than S seconds. Every notebook has two threads (OMP_NUM_THREADS, if set, says how many), because products round by their number."""
import argparse
import base64
import difflib
import hashlib
import io
import os
import re
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor
from PIL import Image


def skipped(cells, flags):
    "Positions of cells that nbdev_test would not run, by nbdev's own reading of directives (the rule in nbdev.test.test_nb)."
    directives = [getattr(c, "directives_", None) or {} for c in cells]
    return {i for i, (c, d) in enumerate(zip(cells, directives))
            if c.cell_type != "code" or flags & d.keys() or d.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in c.source}


def worth_storing(output):
    "Neither stderr (bars, warnings) nor a progress bar on stdout."
    return output.get("name") != "stderr" and not re.search(r"\d(?:it/s|s/it)\]", "".join(output.get("text", "")))


MEASURES = re.compile(r"^#\| *timing\b|\bperf_counter\b|\btimeit\.|\bpsutil\b|\bgetrusage\b", re.M)
VARIES = re.compile(r"\d[\d.,]* ?(?:ms|µs|s|sec|seconds?|min|minutes?|h|[kKMG]i?B|GFLOP/s|(?:tokens|texts|rows|groups)/s|a second)(?![\w/])|\b0x[0-9a-f]{6,}\b|\b\d{4}-\d\d-\d\d\b")
ROUNDING = re.compile(r"(?<![\w.])[-+]?(?:\d(?:\.\d*)?e-(?:0[7-9]|[1-9]\d+)|[01](?:\.\d*)?e-06|0(?:\.0*)?e[-+]00)\b")
NUMBER = re.compile(r"[-+−]?\d[\d.,]*(?:e[-+]?\d+)?%?")


def look(png):
    "A short hash of a picture's pixels; what matplotlib notes about itself in the file does not count."
    image = Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("RGBA")
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:12]


def shown(outputs, measures=False):
    "What readers see of a cell's outputs, as lines: texts with what varies masked, and a hash for each picture."
    text = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data: text.append("picture" if measures else "picture " + look(data["image/png"]))
        else: text.append("".join(output.get("text") or data.get("text/markdown") or data.get("text/html") or data.get("text/plain", "")))
    text = ROUNDING.sub("~0", VARIES.sub("#", "".join(t if t.endswith("\n") else t + "\n" for t in text)))
    if measures: text = re.sub(r"[ \t]+", " ", NUMBER.sub("#", text))
    return text.splitlines()


def differences(stored, fresh):
    "(position, lines of a diff) for each code cell of `stored` whose outputs are not those of `fresh`."
    for i, (old, new) in enumerate(zip(stored, fresh)):
        if old.cell_type != "code": continue
        measures = bool(MEASURES.search(old.source))
        lines = list(difflib.unified_diff(*(shown(cell.get("outputs", []), measures) for cell in (old, new)), "stored", "now", lineterm="", n=0))[2:]
        if lines: yield i, lines


def execute(path, flags):
    "The notebook with the outputs of a run in a fresh shell; skipped cells keep theirs."
    skip, notebook, shell = skipped(NBProcessor(path, process=True).nb.cells, flags), read_nb(path), CaptureShell(path=str(path.parent))
    stored = {i: notebook.cells[i].get("outputs") for i in skip}
    shell.run_all(notebook, exc_stop=True, preproc=lambda cell: cell.idx_ in skip)
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code": continue
        cell.outputs = stored[i] if i in skip else [o for o in cell.outputs if worth_storing(o)]
    return notebook


def refresh(path, flags, timings):
    "Store the outputs that differ, keep the others to the byte; what to say, and no fault."
    notebook, fresh = read_nb(path), execute(path, flags).cells
    differ = {i for i, _ in differences(notebook.cells, fresh)}
    if timings: differ |= {i for i, cell in enumerate(fresh) if cell.cell_type == "code" and MEASURES.search(cell.source) and cell.outputs}
    for i in differ: notebook.cells[i].outputs = fresh[i].outputs
    if differ:
        write_nb(notebook, path)
        nbdev_clean(str(path))
    return f"stored cells {', '.join(map(str, sorted(differ)))}" if differ else "is as stored", 0


def check(path, flags, timings):
    "What differs, as text; how many cells do."
    found = list(differences(read_nb(path).cells, execute(path, flags).cells))
    said = [f"{path.name}, cell {i}:\n" + "".join(f"    {line}\n" for line in lines[:12]) for i, lines in found]
    return "".join(said) + (f"{len(found)} outputs differ" if found else "is as stored"), len(found)


def work(task, most, path, *args):
    "One notebook in a process of its own: what to print, and how many faults there are."
    start = time.perf_counter()
    try: said, faults = task(path, *args)
    except Exception: said, faults = traceback.format_exc() + "raised: nothing is written", 1
    before, _, last = said.rpartition("\n")
    took = time.perf_counter() - start
    late = f", more than {most:g} s" if took > most else ""
    return f"{before}\n"*bool(before) + f"{path.name} {last} ({took:.0f} s{late})", faults + bool(late)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", nargs="*", default=[], help="flags to run although settings.ini skips them, e.g. slow")
    parser.add_argument("--check", action="store_true", help="write nothing, say which outputs differ from the stored ones")
    parser.add_argument("--timings", action="store_true", help="store measured times afresh, too")
    parser.add_argument("--jobs", type=int, default=1, help="how many notebooks to run at a time")
    parser.add_argument("--most", type=float, default=float("inf"), help="seconds that a notebook may take")
    args = parser.parse_args()
    nbs = Path(__file__).resolve().parent
    paths = [(p if p.exists() else nbs / p).resolve() for p in args.notebooks] or sorted(p for p in nbs.glob("*.ipynb") if not p.name.startswith("_"))
    flags = set(get_config().tst_flags.split()) - set(args.flags)
    os.environ["IN_TEST"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.chdir(nbs)
    sys.path.insert(0, str(nbs.parent))
    # each in a process of its own, as a reader runs it: what one chapter sets (fonts, logging) must not show in the next
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        runs, faults = [pool.submit(work, check if args.check else refresh, args.most, path, flags, args.timings) for path in paths], 0
        for said, found in (run.result() for run in runs):
            print(said, flush=True)
            faults += found
    sys.exit(faults > 0)


if __name__ == "__main__": main()
