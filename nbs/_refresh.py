"""Re-execute notebooks and store their outputs.  usage: python nbs/_refresh.py [NOTEBOOK ...] [--flags slow] [--check]   (default: all)

Skips what nbdev_test skips (flags in settings.ini's tst_flags, `#| eval: false`); skipped cells keep the outputs they have.
A notebook that raises is not written. Progress bars and warnings on stderr are not stored.

`--check` writes nothing: it prints which outputs differ from the stored ones, and ends with 1 if any does. Texts are compared word by word,
pictures by their hash. Left out are cells that measure time or memory (`#| timing` as a directive, or `perf_counter`, `timeit`,
`psutil` or `getrusage` in their source); elsewhere numbers with a unit of time, of bytes or of speed count as equal, and so do addresses of objects."""
import argparse
import difflib
import hashlib
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor


def skipped(cells, flags):
    "Positions of cells that nbdev_test would not run, by nbdev's own reading of directives (the rule in nbdev.test.test_nb)."
    directives = [getattr(c, "directives_", None) or {} for c in cells]
    return {i for i, (c, d) in enumerate(zip(cells, directives))
            if c.cell_type != "code" or flags & d.keys() or d.get("eval:", [""])[0].lower() == "false" or "nbdev_export(" in c.source}


def worth_storing(output):
    "Neither stderr (bars, warnings) nor a progress bar on stdout."
    return output.get("name") != "stderr" and not re.search(r"\d(?:it/s|s/it)\]", "".join(output.get("text", "")))


MEASURES = re.compile(r"^#\| *timing\b|\bperf_counter\b|\btimeit\b|\bpsutil\b|\bgetrusage\b", re.M)
VARIES = re.compile(r"\d[\d.,]* ?(?:ms|µs|s|sec|seconds?|min|minutes?|h|[kKMG]i?B|GFLOP/s|(?:tokens|texts|rows|groups)/s|a second)(?![\w/])|\b0x[0-9a-f]{6,}\b|\b\d{4}-\d\d-\d\d\b")


def shown(outputs):
    "What readers see of a cell's outputs, as lines: texts with what varies masked, and a hash for each picture."
    text = []
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data: text.append("picture " + hashlib.sha256("".join(data["image/png"]).strip().encode()).hexdigest()[:12])
        else: text.append("".join(output.get("text") or data.get("text/markdown") or data.get("text/html") or data.get("text/plain", "")))
    return VARIES.sub("#", "".join(t if t.endswith("\n") else t + "\n" for t in text)).splitlines()


def differences(stored, fresh):
    "(position, lines of a diff) for each code cell of `stored` whose outputs are not those of `fresh`."
    for i, (old, new) in enumerate(zip(stored, fresh)):
        if old.cell_type != "code" or MEASURES.search(old.source): continue
        lines = list(difflib.unified_diff(shown(old.get("outputs", [])), shown(new.get("outputs", [])), "stored", "now", lineterm="", n=0))[2:]
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


def refresh(path, flags):
    write_nb(execute(path, flags), path)
    nbdev_clean(str(path))
    print("refreshed", path.name)


def check(path, flags):
    "Print what differs; how many cells do."
    found = list(differences(read_nb(path).cells, execute(path, flags).cells))
    for i, lines in found: print(f"{path.name}, cell {i}:", *(f"    {line}" for line in lines[:12]), sep="\n")
    print(path.name, f"{len(found)} outputs differ" if found else "is as stored", flush=True)
    return len(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", nargs="*", default=[], help="flags to run although settings.ini skips them, e.g. slow")
    parser.add_argument("--check", action="store_true", help="write nothing, say which outputs differ from the stored ones")
    args = parser.parse_args()
    nbs = Path(__file__).resolve().parent
    paths = [(p if p.exists() else nbs / p).resolve() for p in args.notebooks] or sorted(p for p in nbs.glob("*.ipynb") if not p.name.startswith("_"))
    flags = set(get_config().tst_flags.split()) - set(args.flags)
    os.environ["IN_TEST"] = "1"
    os.chdir(nbs)
    sys.path.insert(0, str(nbs.parent))
    work = check if args.check else refresh
    # each in a process of its own, as a reader runs it: what one chapter sets (fonts, logging) must not show in the next
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = sum(pool.submit(work, path, flags).result() or 0 for path in paths)
    sys.exit(found > 0)


if __name__ == "__main__": main()
