"""Re-execute notebooks and store their outputs.  usage: python nbs/_refresh.py [NOTEBOOK ...] [--flags slow]   (default: all)

Skips what nbdev_test skips (flags in settings.ini's tst_flags, `#| eval: false`); skipped cells keep the outputs they have.
A notebook that raises is not written. Progress bars and warnings on stderr are not stored."""
import argparse
import os
import re
import sys
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


def refresh(path, flags):
    skip, notebook, shell = skipped(NBProcessor(path, process=True).nb.cells, flags), read_nb(path), CaptureShell(path=str(path.parent))
    stored = {i: notebook.cells[i].get("outputs") for i in skip}
    shell.run_all(notebook, exc_stop=True, preproc=lambda cell: cell.idx_ in skip)
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "code": continue
        cell.outputs = stored[i] if i in skip else [o for o in cell.outputs if worth_storing(o)]
    write_nb(notebook, path)
    nbdev_clean(str(path))
    print("refreshed", path.name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", nargs="*", default=[], help="flags to run although settings.ini skips them, e.g. slow")
    args = parser.parse_args()
    nbs = Path(__file__).resolve().parent
    paths = [(p if p.exists() else nbs / p).resolve() for p in args.notebooks] or sorted(p for p in nbs.glob("*.ipynb") if not p.name.startswith("_"))
    flags = set(get_config().tst_flags.split()) - set(args.flags)
    os.environ["IN_TEST"] = "1"
    os.chdir(nbs)
    sys.path.insert(0, str(nbs.parent))
    for path in paths: refresh(path, flags)


if __name__ == "__main__": main()
