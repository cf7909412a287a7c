"""Build the site.  usage: python docs/build.py [OUT [WORK]]   (default: _site docs/_build)

Needs no network and imports neither torch nor this package: notebooks are read with their stored outputs, the API pages are made from the
source's text, formulas become MathML. What Sphinx reads is written to WORK/src, what it makes to WORK/html, and copied to OUT when all is well."""
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import api  # noqa: E402
import temperature  # noqa: E402

RENAMED = {"index": "overview"}                     # the README's notebook; the site's start page is docs/index.md
TITLES = {"index": "Overview and results"}
PARTS = {"The method": range(0, 9), "Put to use": range(9, 20), "Runs and records": range(20, 100)}
SEE_ALSO = {"attention": ":::{tip}\n**Try it:** [weights against temperature](temperature.md), with a slider.\n:::"}


def read_settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def directives(source):
    "Directives of a cell as {name: value}: `#| eval: false` gives {'eval': 'false'}."
    found = re.findall(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)$", source, re.M)
    return {name: value.strip() for name, value in found}


def plot_text(source):
    "What a plot's own words say about it, for readers who cannot see it: titles, axes, labels and legend, as they stand in the cell."
    words = []
    try: tree = ast.parse(source)
    except SyntaxError: return ""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call): continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if name in ("set_title", "suptitle", "title", "set_xlabel", "set_ylabel", "xlabel", "ylabel"):
            words += [(call.lineno, a.value) for a in call.args[:1] if isinstance(a, ast.Constant)]
        words += [(k.value.lineno, k.value.value) for k in call.keywords
                  if k.arg in ("title", "xlabel", "ylabel", "label") and isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)]
    return ", ".join(dict.fromkeys(w for _, w in sorted(words, key=lambda x: x[0]) if isinstance(w, str)))


def image_alt(source, heading):
    "Alternative text of a cell's picture: `#| fig-alt:` if the cell has one, else its titles and labels."
    given = directives(source).get("fig-alt", "").strip("\"'")
    return given or f"Plot, section “{heading}”" + (f": {plot_text(source)}" if plot_text(source) else "")


def relink(text, blob, names):
    "Links of a notebook as seen from the site: notebooks that are pages, files of the repository on its host, pictures as they are."
    def target(match):
        link, _, anchor = match[2].partition("#")
        stem = Path(link).stem
        if link.endswith(".ipynb") and "/" not in link and stem in names: return f"{match[1]}({RENAMED.get(stem, stem)}.ipynb{'#' + anchor if anchor else ''})"
        if link.startswith("images/"): return match[0]
        return f"{match[1]}({blob}/{link.removeprefix('../')})" if link.startswith("../") else f"{match[1]}({blob}/nbs/{link})"
    return re.sub(r"(\])\((?!https?:|mailto:|#)([^)\s]+)\)", target, text)


def prepare_code(cell, heading):
    "A code cell for readers, or None if it is hidden. Its source loses directives; tags tell myst-nb what not to show."
    source = "".join(cell["source"])
    found = directives(source)
    if "hide" in found or found.get("include") == "false": return None
    shown = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip("\n")
    if not shown.strip(): return None
    tags = [tag for tag, name, values in (("remove-input", "echo", ("false",)), ("remove-output", "output", ("false",)),
                                          ("hide-input", "code-fold", ("true", "show")), ("hide-output", "collapse_output", ("",)),
                                          ("not-run", "eval", ("false",)), ("kept-output", "slow", ("",)), ("kept-output", "cuda", ("",))) if found.get(name) in values]
    cell |= {"source": shown, "metadata": {"tags": tags}, "outputs": [] if "remove-output" in tags else cell["outputs"]}
    if "remove-input" in tags and not cell["outputs"]: return None
    if any("image/png" in o.get("data", {}) for o in cell["outputs"]): cell["metadata"]["mystnb"] = {"image": {"alt": image_alt(source, heading)}}
    return cell


def prepare_notebook(path, blob, names):
    "A notebook as the site shows it, and its title."
    notebook, cells, heading, title = json.loads(path.read_text(encoding="utf-8")), [], "", ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "raw": continue
        if cell["cell_type"] == "markdown":
            text = relink("".join(cell["source"]), blob, names)
            headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
            title = title or (headings[0] if headings else "")
            heading = headings[-1].strip("`* ") if headings else heading
            if path.stem in TITLES: text = re.sub(r"\A# .+", f"# {TITLES[path.stem]}", text)
            cell["source"] = text
        else: cell = prepare_code(cell, heading)
        if cell: cells.append(cell)
    extra = next((text for word, text in SEE_ALSO.items() if path.stem.endswith(f"_{word}")), "")
    end = f"{extra}\n\n---\n\n[The notebook of this page]({blob}/nbs/{path.name})"
    cells.append({"cell_type": "markdown", "id": "site-end", "metadata": {}, "source": end})
    metadata = notebook["metadata"] | {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}      # for `!pip` and magics
    return notebook | {"cells": cells, "metadata": metadata}, title or path.stem


def reading_order(titles):
    "The start page's tables of contents: chapters by number, the rest behind them."
    out = []
    def toc(caption, lines): out.append(f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n" + "\n".join(lines) + "\n```")
    toc("Start here", ["Overview and results <overview>", "documents", "gpus"])
    for part, numbers in PARTS.items():
        lines = []
        for stem, title in titles.items():
            if not stem[0].isdigit() or int(stem[:2]) not in numbers: continue
            lines.append(f"{stem.split('_')[0]} {title} <{stem}>")
            if stem.endswith("_attention"): lines.append("temperature")
        if lines: toc(part, lines)
    toc("Reference", ["api/overview", "glossary", "reading", "comparison", "readers"])
    return "\n\n".join(out)


def write_sources(src):
    "Everything Sphinx reads, below the folder `src`."
    settings = read_settings()
    blob = f"{settings['git_url']}/blob/{settings['branch']}"
    src.mkdir(parents=True)
    notebooks = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("_"))
    names, titles = {p.stem for p in notebooks}, {}
    for path in notebooks:
        page, title = prepare_notebook(path, blob, names)
        stem = RENAMED.get(path.stem, path.stem)
        titles[stem] = title
        (src / f"{stem}.ipynb").write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
    shutil.copytree(ROOT / "nbs" / "images", src / "images", ignore=shutil.ignore_patterns("*.py"))
    shutil.copytree(HERE / "_static", src / "_static")
    for path in HERE.glob("*.md"): shutil.copy(path, src)
    for path in (HERE / "conf.py", HERE / "mathml.py", ROOT / "settings.ini"): shutil.copy(path, src)
    (src / "index.md").write_text((HERE / "index.md").read_text(encoding="utf-8") + "\n\n" + reading_order(titles) + "\n", encoding="utf-8")
    (src / "widget.html").write_text(temperature.widget(), encoding="utf-8")
    (src / "_static" / "temperature.svg").write_text(temperature.fallback(), encoding="utf-8")
    (src / "names.json").write_text(json.dumps(api.write_pages(ROOT / "revela_nb", src / "api", blob, titles)), encoding="utf-8")


def main():
    out, work = (Path(given or default).resolve() for given, default in zip((sys.argv[1:] + [None, None])[:2], (ROOT / "_site", HERE / "_build")))
    if out.exists() and any(out.iterdir()) and not (out / ".nojekyll").exists(): sys.exit(f"{out} holds something that is no site of ours: name an empty or a new folder")
    for name in ("src", "html", "doctrees", "jupyter_execute"): shutil.rmtree(work / name, ignore_errors=True)
    write_sources(work / "src")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "--keep-going", "-W", "-d", str(work / "doctrees"), str(work / "src"), str(work / "html")]
    if subprocess.run(command).returncode:
        sys.exit(f"the site was not built: see the faults above. Files named there are in {work / 'src'}; they are made from nbs/*.ipynb, docs/*.md and revela_nb/*.py: mend those")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(work / "html", out, ignore=shutil.ignore_patterns(".buildinfo", "objects.inv"))
    (out / ".nojekyll").touch()
    (out / ".gitignore").write_text("*\n")
    print(f"built {len(list(out.rglob('*.html')))} pages in {out}")


if __name__ == "__main__": main()
