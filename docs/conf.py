"""Sphinx's settings. docs/build.py copies this file, mathml.py and settings.ini beside the prepared sources, and it is read there."""
import configparser
import json
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

SRC = Path(__file__).resolve().parent
sys.path.insert(0, str(SRC))

_config = configparser.ConfigParser(delimiters=["="])
_config.read(SRC / "settings.ini", encoding="utf-8")
_settings = _config["DEFAULT"]

project, author, copyright = _settings["lib_name"], _settings["author"], _settings["copyright"]
version = release = _settings["version"]
language = "en"
smartquotes = False                        # "" in the meaning of a parameter is a string, not typography
extensions = ["myst_nb", "mathml"]
html_math_renderer = "mathml"
exclude_patterns = ["**/.ipynb_checkpoints"]
suppress_warnings = ["mystnb.unknown_mime_type", "misc.highlighting_failure", "myst.header"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"          # tables in markdown outputs
nb_number_source_lines = False
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline", "attrs_block"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto"]
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries = False

linkcheck_ignore = [r"https?://(localhost|127\.0\.0\.1)", rf"https://colab\.research\.google\.com/github/{_settings['user']}/"]      # Colab answers 200 whatever it is asked
linkcheck_anchors = False
linkcheck_timeout, linkcheck_retries = 30, 3

html_theme = "furo"
html_title = "revela_nb"
html_baseurl = f"{_settings['doc_host']}{_settings['doc_baseurl']}/"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}


def link_names(app, doctree):
    "Names of functions and classes, written as `code` in a notebook, lead to their entry in the API."
    if app.env.docname.startswith("api/"): return
    names = json.loads((SRC / "names.json").read_text(encoding="utf-8"))
    where = {}
    for module, exported in names.items():
        for name in exported: where.setdefault(name, []).append(f"revela_nb.{module}.{name}")
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().removesuffix("()")
        telling = "_" in name.strip("_") or name[:1].isupper() and not name.isupper()
        if not telling or len(where.get(name, [])) != 1 or isinstance(literal.parent, (nodes.reference, nodes.title, addnodes.pending_xref)): continue
        link = addnodes.pending_xref("", literal.deepcopy(), refdomain="py", reftype="obj", reftarget=where[name][0], refexplicit=True, refwarn=False, refdoc=app.env.docname)
        literal.replace_self(link)


def setup(app):
    app.connect("doctree-read", link_names)
