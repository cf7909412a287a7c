"""API pages from the exported source: signatures by `ast`, docments (comments beside parameters) by `tokenize`. Nothing is imported."""
import ast
import io
import re
import tokenize
from pathlib import Path


def read_comments(source):
    "Comment text by line number; directives and nbdev's cell marks are none."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(("# %%", "#|"))}


def escape(text):
    "Plain text as markdown: only `code` keeps its meaning."
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\*_<>\[\]$|{}~])", r"\\\1", p) for i, p in enumerate(parts))


def code(text): return f"``{text}``" if text else ""


def cell(text): return code(text).replace("|", r"\|")


def parameters(function, comments, method):
    "Rows (name, type, default, meaning) of a function's parameters; a method's own first one is left out."
    a = function.args
    positional, keyword_only = a.posonlyargs + a.args, a.kwonlyargs
    defaults = dict(zip([x.arg for x in positional[len(positional) - len(a.defaults):]], a.defaults))
    defaults |= {x.arg: d for x, d in zip(keyword_only, a.kw_defaults) if d is not None}
    named = [(x, x.arg) for x in positional] + [(x, f"*{x.arg}") for x in [a.vararg] if x] + [(x, x.arg) for x in keyword_only] + [(x, f"**{x.arg}") for x in [a.kwarg] if x]
    line = {name: (defaults[x.arg] if x.arg in defaults else x).end_lineno for x, name in named}
    # several on a line share its comment
    in_header = lambda end: end < function.body[0].lineno
    return [(name, ast.unparse(x.annotation) if x.annotation else "", ast.unparse(defaults[x.arg]) if x.arg in defaults else "",
             comments.get(line[name], "") if in_header(line[name]) else "")
            for x, name in named if not (method and name in ("self", "cls"))]


def field_row(statement, comments):
    "Name, type, default, meaning of a dataclass's field; `field(default=..., metadata={'help': ...})` says the last two itself."
    default, meaning = statement.value, comments.get(statement.end_lineno, "")
    if isinstance(default, ast.Call) and ast.unparse(default.func).split(".")[-1] == "field":
        given = {k.arg: k.value for k in default.keywords}
        try: meaning = meaning or ast.literal_eval(given["metadata"]).get("help", "")
        except (KeyError, ValueError): pass
        default = given.get("default", given.get("default_factory"))
    return statement.target.id, ast.unparse(statement.annotation), ast.unparse(default) if default else "", meaning


def fields(cls, comments):
    "Rows of a dataclass's fields."
    return [field_row(s, comments) for s in cls.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]


def table(rows):
    if not any(t or m for _, t, _, m in rows): return []              # nothing to say beyond the signature
    out = ["| name | type | default | meaning |", "|---|---|---|---|"]
    return out + [f"| {cell(n)} | {cell(t)} | {cell(d)} | {escape(m)} |" for n, t, d, m in rows] + [""]


def signature(function, method):
    "Names and defaults; types stand in the table."
    bare = ast.parse(ast.unparse(function)).body[0].args
    for x in [*bare.posonlyargs, *bare.args, *bare.kwonlyargs, bare.vararg, bare.kwarg]:
        if x: x.annotation = None
    if method: bare.args = [x for x in bare.args if x.arg not in ("self", "cls")]
    return f"({ast.unparse(bare)})"


def returned(function, comments):
    if function.returns is None or ast.unparse(function.returns) == "None": return []
    meaning = comments.get(function.returns.end_lineno, "") if function.returns.end_lineno <= function.body[0].lineno else ""
    return [f"**Returns** {code(ast.unparse(function.returns))}" + (f": {escape(meaning)}" if meaning else ""), ""]


def described(node):
    "The docstring; its sentences on errors as a line of their own."
    text = " ".join((ast.get_docstring(node) or "").split())
    raises = re.findall(r"(?:^|(?<=[.;:)] ))Raises (?:an? )?[A-Z].*?(?:\.(?= |$)|$)", text)
    for sentence in raises: text = text.replace(sentence, "").strip()
    out = [escape(text), ""] if text else []
    return out, [f"**Raises** {escape(' '.join(s.removeprefix('Raises ') for s in raises))}", ""] if raises else []


def function_lines(function, comments, kind, name):
    text, raises = described(function)
    method = kind != "function"
    return [f"::::{{py:{kind}}} {name}{signature(function, method)}", "", *text, *table(parameters(function, comments, method)), *returned(function, comments), *raises]


def class_lines(cls, comments):
    "A class: fields or __init__, then the public methods."
    methods = {m.name: m for m in cls.body if isinstance(m, ast.FunctionDef)}
    text, raises = described(cls)
    init = methods.get("__init__")
    out = [f":::::{{py:class}} {cls.name}{signature(init, True) if init else ''}", "", *text]
    if cls.bases: out += ["Built on " + ", ".join(code(ast.unparse(b)) for b in cls.bases) + ".", ""]
    out += table(fields(cls, comments)) + (table(parameters(init, comments, True)) if init else []) + raises
    for name, method in methods.items():
        if name.startswith("_") and name != "__call__": continue
        decorators = {ast.unparse(d) for d in method.decorator_list}
        kind = "property" if "property" in decorators else "classmethod" if "classmethod" in decorators else "method"
        lines = function_lines(method, comments, kind, f"{cls.name}.{name}")
        if kind == "property": lines[0] = lines[0].split("(")[0]
        out += lines + ["::::", ""]
    return out


def constant_lines(node, name, comments):
    value = " ".join(ast.unparse(node.value).split())
    value = value if len(value) < 100 else value[:97] + "..."
    meaning = comments.get(node.end_lineno, "")
    return [f"::::{{py:data}} {name}", "", f"{code(value)}" + (f": {escape(meaning)}" if meaning else ""), ""]


def module_page(path, blob, chapters):
    "Markdown page of one module, and the names it exports. `blob`: where the repository's files are shown; `chapters`: notebook titles by stem."
    source = path.read_text(encoding="utf-8")
    tree, comments = ast.parse(source), read_comments(source)
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found[node.name] = node
        if isinstance(node, ast.Assign): found |= {t.id: node for target in node.targets for t in ast.walk(target) if isinstance(t, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): found[node.target.id] = node
    exported = ast.literal_eval(found["__all__"].value) if "__all__" in found else []
    notebook = re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", source)
    dotted = f"revela_nb.{path.stem}"
    out = [f"# `{dotted}`", "", escape(ast.get_docstring(tree) or ""), "", f":::{{py:module}} {dotted}", ":::", ""]
    if notebook and notebook[1] in chapters: out += [f"Explained and tested in [{chapters[notebook[1]]}](../{notebook[1]}.ipynb).", ""]
    order = sorted(exported, key=lambda n: (isinstance(found.get(n), (ast.Assign, ast.AnnAssign)), getattr(found.get(n), "lineno", 0)))
    for name in order:
        node = found.get(name)
        if node is None: continue
        is_class = isinstance(node, ast.ClassDef)
        out += [f"({dotted}.{name})=", f"## {name}", ""] if not isinstance(node, (ast.Assign, ast.AnnAssign)) else []
        out += class_lines(node, comments) if is_class else function_lines(node, comments, "function", name) if isinstance(node, ast.FunctionDef) else constant_lines(node, name, comments)
        out += [f"[source]({blob}/revela_nb/{path.name}#L{node.lineno})", "", ":::::" if is_class else "::::", ""]
    return "\n".join(out), exported


def write_pages(package, folder, blob, chapters):
    "Write a page for every module and an overview; returns exported names by module."
    folder.mkdir(parents=True, exist_ok=True)
    names, first = {}, []
    for path in sorted(Path(package).glob("*.py")):
        if path.stem.startswith("_"): continue
        page, names[path.stem] = module_page(path, blob, chapters)
        (folder / f"{path.stem}.md").write_text(page, encoding="utf-8")
        first.append((path.stem, escape((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0])))
    rows = "\n".join(f"| [revela_nb.{m}]({m}.md) | {text} | {len(names[m])} |" for m, text in first)
    toc = "\n".join(m for m, _ in first)
    (folder / "overview.md").write_text(f"# API\n\nEvery exported name, from the comments beside its parameters in the source.\n\n"
        f"| module | what it is for | names |\n|---|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n", encoding="utf-8")
    return names
