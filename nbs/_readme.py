"""Make README.md from nbs/index.ipynb.  usage: python nbs/_readme.py [--check]

Plots stored in the notebook become nbs/images/index_N.png, links to notebooks and pictures are made relative to the repository."""
import base64
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent
README = NBS.parent / "README.md"


def relative(text):
    "Links as seen from the repository: pictures and notebooks lie in nbs/."
    return re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")


def shown(source):
    "A code cell without directives; empty for a hidden one."
    lines = source.splitlines()
    directives = [line for line in lines if line.startswith("#|")]
    if any("hide" in d or "echo: false" in d for d in directives): return ""
    return "\n".join(line for line in lines if not line.startswith("#|")).strip()


def picture_text(source):
    "What `#| fig-alt:` says of a cell's picture; a picture without words is an error."
    said = re.search(r"^#\| *fig-alt: *[\"']?(.+?)[\"']?$", source, re.M)
    if not said: raise ValueError(f"a picture of the index has no `#| fig-alt:`: {source[:80]!r}")
    return said[1]


def output_text(output, pictures, source):
    "One stored output of a cell as markdown; a PNG is collected in `pictures` and linked."
    data = output.get("data", {})
    if "image/png" in data:
        pictures.append(base64.b64decode(data["image/png"]))
        return f"![{picture_text(source)}](nbs/images/index_{len(pictures)}.png)"
    if "text/markdown" in data: return relative("".join(data["text/markdown"]))
    text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return "\n".join("    " + line for line in text.splitlines())


def render(notebook):
    "README text and the pictures it links."
    parts, pictures = ["<!-- Made from nbs/index.ipynb by nbs/_readme.py. Do not edit. -->"], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(relative(source))
        if cell["cell_type"] != "code": continue
        if shown(source): parts.append(f"```python\n{shown(source)}\n```")
        if "#| hide\n" not in source: parts += [output_text(o, pictures, source) for o in cell["outputs"]]
    return "\n\n".join(p for p in parts if p.strip()) + "\n", pictures


def main():
    text, pictures = render(json.loads((NBS / "index.ipynb").read_text(encoding="utf-8")))
    files = {README: text.encode()} | {NBS / "images" / f"index_{i}.png": p for i, p in enumerate(pictures, 1)}
    if "--check" in sys.argv:
        stale = [str(p.relative_to(NBS.parent)) for p, content in files.items() if not p.exists() or p.read_bytes() != content]
        if stale: sys.exit(f"not made from the index as it is: {', '.join(stale)}. Run python nbs/_readme.py")
        return
    for path, content in files.items(): path.write_bytes(content)


if __name__ == "__main__": main()
