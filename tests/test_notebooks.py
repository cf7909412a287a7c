"""The notebooks as a book: order of imports, outputs fit to be read, modules in sync, documented parameters."""
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9i]*.ipynb"))
MODULES = sorted(p for p in (ROOT / "revela_nb").glob("*.py") if not p.name.startswith("_"))
SOURCE = {p: re.search(r"\.\./nbs/(\d+[a-z]?)_\w+\.ipynb", p.read_text(encoding="utf-8")) for p in MODULES}


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def text(x): return "".join(x) if isinstance(x, list) else (x or "")


def stored_text(cell):
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield text(output.get("text", "")) + "".join(text(data.get(f"text/{kind}", "")) for kind in ("plain", "html", "markdown"))


def imports(source):
    "Dotted names that Python source imports; `from package import name` gives package.name too. Cells with magics have none."
    try: tree = ast.parse(source)
    except SyntaxError: return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "revela_nb" + f".{node.module}" * bool(node.module) if node.level else node.module
            yield base
            yield from (f"{base}.{a.name}" for a in node.names)


def test_there_are_modules():
    names = {p.stem for p in MODULES}
    assert {"corpus", "batching", "retriever", "attention", "patching", "model", "trainer", "evaluation", "cli"} <= names
    assert all(SOURCE.values()), [p.name for p, m in SOURCE.items() if not m]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_to_lower_numbers(path):
    number = {p.stem: m[1] for p, m in SOURCE.items()}
    for name in imports(path.read_text(encoding="utf-8")):
        assert name.split(".")[0] not in ("fastcore", "nbdev", "execnb", "ghapi", "nbconvert", "pytest"), f"{path.name} needs {name} at runtime"
        ours = re.fullmatch(r"revela_nb\.(\w+)", name)
        if ours and ours[1] in number: assert number[ours[1]] < number[path.stem], f"{path.name} imports {name}, which comes later"


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[0].isdigit()], ids=lambda p: p.stem)
def test_notebooks_use_only_what_came_before(path):
    "Cells that are not exported count too; a notebook may import the module that it exports."
    number, here = {p.stem: m[1] for p, m in SOURCE.items()}, path.name.split("_")[0]
    for i, cell in enumerate(cells(path)):
        for name in imports(text(cell["source"])) if cell["cell_type"] == "code" else ():
            ours = re.fullmatch(r"revela_nb\.(\w+)", name)
            if ours and ours[1] in number: assert number[ours[1]] <= here, f"cell {i} imports {name}, which comes later"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_fit_to_be_read(path):
    assert path.stat().st_size < 500_000
    for i, cell in enumerate(cells(path)):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"cell {i} stores a traceback"
            assert output.get("name") != "stderr", f"cell {i} stores stderr"
        for out in stored_text(cell):
            assert not re.search(r"(?<![\w:./<>-])/(?:home|root|work|tmp|usr|Users)/\w", out), f"cell {i} stores a path of somebody's machine"
            assert "Warning:" not in out, f"cell {i} stores a warning"
            assert not re.search(r"\d(?:it/s|s/it)\]", out), f"cell {i} stores a progress bar"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_plot_is_stored(path):
    "A plot cell that was edited and not refreshed shows readers nothing."
    for i, cell in enumerate(cells(path)):
        if cell["cell_type"] != "code" or not re.search(r"^(?!def |class |[ #]).*plt\.show\(\)", text(cell["source"]), re.M): continue
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), f"cell {i} draws a plot that is not stored: python nbs/_refresh.py nbs/{path.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_parameter_is_documented(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    for function in ast.walk(ast.parse("\n".join(lines))):
        if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"): continue
        exported = function.col_offset == 0
        if not exported: continue
        a = function.args
        for arg in a.posonlyargs + a.args + a.kwonlyargs:
            if arg.arg not in ("self", "cls"): assert "#" in lines[arg.end_lineno - 1] or "#" in lines[arg.lineno - 1], f"{path.name}: {function.name}({arg.arg}) has no docment"
        assert ast.get_docstring(function), f"{path.name}: {function.name} has no docstring"


def test_modules_are_the_notebooks_export(tmp_path):
    "What a fresh export writes is what is committed. Only what the export reads is copied: a checkout may hold a virtual environment."
    copy = tmp_path / "repo"
    (copy / "nbs").mkdir(parents=True)
    (copy / "revela_nb").mkdir()
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copy(ROOT / "revela_nb" / "__init__.py", copy / "revela_nb")
    for path in NOTEBOOKS: shutil.copy(path, copy / "nbs")
    code = "from nbdev.export import nb_export\nimport glob\nfor n in sorted(glob.glob('nbs/[0-9]*.ipynb')): nb_export(n)"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=120)
    for path in MODULES: assert (copy / "revela_nb" / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"{path.name} is not what nbdev_export writes"


COLAB = """
import os, sys, types
from IPython.core.interactiveshell import InteractiveShell
shell, asked, where = InteractiveShell.instance(), [], sys.argv[2]
shell.register_magic_function(asked.append, "line", "pip")      # installs nothing: what pip installs as editable, a running interpreter does not see
if where == "colab": sys.modules["google.colab"] = types.ModuleType("google.colab")
for _ in range(2): shell.run_cell(sys.argv[1]).raise_error()
if where == "colab": import toy_of_ours
print("asked", asked)
print("folder", os.getcwd())
"""


@pytest.fixture
def run_install_cell(tmp_path):
    "The install cell of the first chapter, run twice in one process; git fetches a toy repository, Colab's folder is a temporary one."
    if not shutil.which("git"): pytest.skip("needs git")
    pytest.importorskip("IPython")
    toy, content = tmp_path / "toy", tmp_path / "content"
    for path in (toy / "toy_of_ours" / "__init__.py", toy / "nbs" / "01.ipynb"):
        path.parent.mkdir(parents=True)
        path.touch()
    content.mkdir()
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "toy"]): subprocess.run(["git", *command], cwd=toy, check=True)
    cell = next(text(c["source"]) for c in cells(ROOT / "nbs" / "01_corpus.ipynb") if "google.colab" in text(c["source"]))
    def run(where, cell=cell):
        environment = os.environ | {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{toy.as_uri()}.insteadOf", "GIT_CONFIG_VALUE_0": "https://github.com/revela-nb/revela_nb",
                                    "IPYTHONDIR": str(tmp_path / "ipython")}
        return subprocess.run([sys.executable, "-c", COLAB, cell.replace("/content", str(content)), where], cwd=content, env=environment, capture_output=True, text=True, timeout=120)
    return run, content, cell


def test_in_colab_the_install_cell_makes_the_package_importable_and_can_be_run_twice(run_install_cell):
    run, content, cell = run_install_cell
    done = run("colab")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"folder {content / 'revela_nb' / 'nbs'}" in done.stdout and [p.name for p in content.rglob("nbs")] == ["nbs"], "cloned within itself"
    extras = re.search(r"asked \['install -q -e \"\.\.\[([\w,]+)\]\"', ", done.stdout)[1].split(",")
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    wanted = " ".join(settings["DEFAULT"][f"{extra}_requirements"] for extra in extras)
    assert all(name in wanted for name in ("fastcore", "pypdf", "starlette")), "chapters import these"
    assert "ModuleNotFoundError" in run("colab", re.sub(r".*sys\.path.*", "", cell)).stderr, "the check itself finds nothing"


def test_elsewhere_the_install_cell_does_nothing(run_install_cell):
    run, content, _ = run_install_cell
    done = run("here")
    assert done.returncode == 0 and "asked []" in done.stdout and f"folder {content}\n" in done.stdout and not list(content.iterdir()), done.stdout + done.stderr


def test_the_install_cell_is_the_same_in_all_chapters():
    assert len({text(c["source"]) for path in NOTEBOOKS for c in cells(path) if "google.colab" in text(c["source"])}) == 1


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[0].isdigit() and p.stem != "00_tour"], ids=lambda p: p.stem)
def test_every_chapter_shows_where_we_are(path):
    "The pipeline with this chapter's stage lit, below its heading; the tour shows all of the method instead."
    prose = "\n\n".join(text(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    shown = re.search(r"^## Where we are\n\n!\[The pipeline in eight stages: [^\]]* lit\]\((images/pipeline-\w+\.png)\)$", prose, re.M)
    assert shown and (ROOT / "nbs" / shown[1]).exists()


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.name[0].isdigit()], ids=lambda p: p.stem)
def test_every_chapter_ends_alike(path):
    "What goes wrong, differences, exercises, in this order and with a solution folded away below each exercise or below all."
    prose = "\n\n".join(text(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
    ends = [m for m in re.findall(r"^## (What goes wrong|Differences|Exercises)", prose, re.M)]
    assert list(dict.fromkeys(ends)) == ["What goes wrong", "Differences", "Exercises"]
    assert re.findall(r"^## (.*)", prose, re.M)[-1].startswith("Exercises") and "<details><summary>Solution" in prose.rpartition("## Exercises")[2]
