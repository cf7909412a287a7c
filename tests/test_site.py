"""The site: built once, then read as files and, where there is a browser, looked at in headless Chromium."""
import ast
import copy
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

for needed in ("sphinx", "myst_nb", "furo", "latex2mathml"): pytest.importorskip(needed, reason=f"the site needs {needed}: pip install -e '.[docs]'")
bs4 = pytest.importorskip("bs4")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith("_"))
BUILT_BY_SPHINX = ("genindex", "py-modindex", "search")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site; the checkout's own _site and docs/_build stay as they are."
    out, work, start = tmp_path_factory.mktemp("site") / "out", tmp_path_factory.mktemp("work"), time.perf_counter()
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", out, work], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (out / "seconds").write_text(str(time.perf_counter() - start))
    return out


@pytest.fixture(scope="module")
def pages(site):
    "Parsed pages by their path below the site."
    return {p.relative_to(site).as_posix(): bs4.BeautifulSoup(p.read_text(encoding="utf-8"), "html.parser") for p in sorted(site.rglob("*.html"))}


def shown_text(page):
    "Text of the article itself, without navigation."
    return page.find("article").get_text()


def chapter(path):
    "The page that a notebook became."
    return "overview.html" if path.stem == "index" else f"{path.stem}.html"


def test_the_build_is_quick(site):
    assert float((site / "seconds").read_text()) < 180


def test_every_notebook_is_a_page_in_reading_order(pages):
    assert all(chapter(p) in pages for p in NOTEBOOKS)
    chapters, at, seen = [chapter(p) for p in NOTEBOOKS if p.name[0].isdigit()], "index.html", []
    while at and at not in seen:
        seen.append(at)
        following = pages[at].find("a", class_="next-page")
        at = following and os.path.normpath(Path(at).parent / following["href"])
    assert [p for p in seen if p in chapters] == chapters
    assert seen.index("temperature.html") == 1 + seen.index("04_attention.html")


def test_three_entrances(pages):
    links = [a["href"] for a in pages["index.html"].select(".entrances a")]
    assert links == ["00_tour.html", "documents.html", "gpus.html"]


def test_no_dead_internal_link_or_picture(site, pages):
    anchors = {name: {e["id"] for e in page.find_all(id=True)} for name, page in pages.items()}
    dead = []
    for name, page in pages.items():
        for element, key in [(e, k) for k in ("href", "src") for e in page.find_all(attrs={k: True})]:
            link, anchor = urldefrag(re.sub(r"\?v=\w+", "", unquote(element[key])))
            if re.match(r"[a-z]+:", link): continue
            target = (site / name).parent.joinpath(link).resolve() if link else site / name
            inside = target.relative_to(site.resolve()).as_posix() if target.is_relative_to(site.resolve()) else None
            if not target.exists() or inside is None: dead.append((name, element[key]))
            elif anchor and element.name == "a" and inside in anchors and anchor not in anchors[inside]: dead.append((name, element[key]))
    assert not dead


def test_links_to_the_repository_lead_to_files_that_are_there(pages):
    blob = re.compile(r"https://github\.com/[\w-]+/[\w-]+/blob/\w+/([^#\"]+)")
    linked = {m[1] for page in pages.values() for a in page.find_all("a", href=True) if (m := blob.match(a["href"]))}
    assert linked and not [p for p in sorted(linked) if not (ROOT / p).exists()]


def test_nothing_is_fetched_from_elsewhere(pages):
    for name, page in pages.items():
        fetched = [e.get("src") or e.get("href") for e in page.find_all(["script", "img", "iframe"]) + page.find_all("link", rel="stylesheet")]
        assert not [u for u in fetched if u and re.match(r"(https?:)?//", u)], name


def test_titles_languages_and_alternative_texts(pages):
    for name, page in pages.items():
        assert page.title.get_text(strip=True) and page.html["lang"] == "en", name
        if name.removesuffix(".html") not in BUILT_BY_SPHINX: assert len(page.find("article").find_all("h1")) == 1, name
        for image in page.find("article").find_all("img") if name != "py-modindex.html" else (): assert len(image.get("alt", "")) > 8, (name, image.get("src"))


def test_plots_arrived(pages):
    for path in NOTEBOOKS:
        stored = sum("image/png" in o.get("data", {}) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])
                     if not re.search(r"^#\| ?(hide|output: ?false)", "".join(c["source"]), re.M))
        assert len(pages[chapter(path)].select("div.cell_output img")) == stored, path.name


def test_formulas_are_mathml(pages):
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = re.sub(r"```.*?```|`[^`]*`", "", "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), flags=re.S)
        written = len(re.findall(r"\$\$.+?\$\$", prose, re.S))
        page = copy.deepcopy(pages[chapter(path)])
        assert len(page.select(".math-block math")) >= written, path.name
        for gone in page.select("pre, code, math"): gone.extract()
        assert not re.search(r"\\(frac|sum|tau|text|log|lVert)\b|\$\$", shown_text(page)), path.name


def test_formulas_are_cut_at_wide_spaces_only():
    sys.path.insert(0, str(ROOT / "docs"))
    try: mathml = pytest.importorskip("mathml", reason="needs latex2mathml: pip install -e '.[docs]'")
    finally: sys.path.pop(0)
    assert mathml.pieces(r"a = {x \quad y},\qquad b \{ \quad c") == [r"a = {x \quad y},", r"b \{", "c"] and mathml.pieces("a") == ["a"]
    assert "&#x0230A;" in mathml.to_mathml(r"\Big\lfloor x \Big\rfloor", "block")
    with pytest.raises(ValueError, match="left in the output"): mathml.to_mathml(r"\nosuch x", "block")


def test_no_markdown_is_left_raw(pages):
    for name, page in pages.items():
        prose = copy.deepcopy(page.find("article"))
        for code in prose.find_all(["pre", "code"]): code.extract()
        assert not re.search(r"\|-{3}|^#{1,4} \w|\]\(\w", prose.get_text(), re.M), name


def test_directives_and_hidden_cells_stay_out(pages):
    for path in NOTEBOOKS:
        text = shown_text(pages[chapter(path)])
        assert not re.search(r"^#\|", text, re.M), path.name
        blocks = {block.get_text().strip() for block in pages[chapter(path)].find_all("pre")}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            directive, _, source = "".join(cell["source"]).partition("\n")
            if cell["cell_type"] == "code" and re.match(r"#\| ?hide\b", directive): assert source.strip() not in blocks or not source.strip(), (path.name, source)


def test_search_index_finds_in_batch_attention(site):
    index = json.loads(re.search(r"Search\.setIndex\((.*)\)", (site / "searchindex.js").read_text(encoding="utf-8"), re.S)[1])
    def documents(word):
        hits = [index[where].get(word, []) for where in ("terms", "titleterms")]
        return {d for h in hits for d in (h if isinstance(h, list) else [h])}
    found = {index["docnames"][i] for i in documents("batch") & documents("attent")}
    assert {"glossary", "04_attention"} <= found, found


def test_api_lists_every_exported_name_with_its_parameters(pages):
    modules = [p for p in sorted((ROOT / "revela_nb").glob("*.py")) if not p.name.startswith("_")]
    assert modules
    for path in modules:
        tree, page = ast.parse(path.read_text(encoding="utf-8")), pages[f"api/{path.stem}.html"]
        exported = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
        shown = {e["id"] for e in page.select("dt[id]")}
        assert {f"revela_nb.{path.stem}.{n}" for n in exported} <= shown, path.name
        for function in (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in exported):
            entry = page.find("dt", id=f"revela_nb.{path.stem}.{function.name}").find_next_sibling("dd")
            rows = [[c.get_text() for c in row.find_all("td")] for row in entry.select("tbody tr")]
            names = [a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
            assert [r[0].lstrip("*") for r in rows if not r[0].startswith("*")] == names, (path.name, function.name)
            assert all(r[3] for r in rows), (path.name, function.name, rows)


def test_what_the_temperature_page_says_is_so():
    sys.path.insert(0, str(ROOT / "docs"))
    try: import temperature
    finally: sys.path.pop(0)
    row = {tau: temperature.weights(temperature.similarity(), tau) for tau in (1, 0.1, 1e-4)}
    assert round(sum(row[1][0][3:]), 2) == 0.45 and sum(row[0.1][0][3:]) < 0.01 and min(max(r) for r in row[1e-4]) > 0.999


def test_dataclass_fields_show_their_help(pages):
    row = next(r for r in pages["api/trainer.html"].find("dt", id="revela_nb.trainer.RevelaArguments").find_next_sibling("dd").select("tbody tr") if r.td.get_text() == "learning_rate")
    cells = [c.get_text() for c in row.find_all("td")]
    assert "field(" not in cells[2] and float(cells[2]) > 0 and "rate" in cells[3]


def test_the_build_does_not_wipe_a_stranger_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", tmp_path], capture_output=True, text=True)
    assert done.returncode and "no site of ours" in done.stderr and (tmp_path / "mine.txt").exists()


def test_names_in_prose_lead_to_the_api(pages):
    link = pages["temperature.html"].find("a", href="api/attention.html#revela_nb.attention.in_batch_weights")
    assert link and link.get_text() == "in_batch_weights"


def test_model_answers_stand_where_readers_md_says():
    "Twelve questions, twelve answers, and each names a page and sections that are there."
    text = (ROOT / "docs" / "readers.md").read_text(encoding="utf-8")
    questions, answers = (re.split(r"^\d+\. ", re.search(rf"^## {name}\n(.*?)^## ", text, re.M | re.S)[1], flags=re.M)[1:] for name in ("Questions", "Answers"))
    assert len(questions) == len(answers) == 12
    for answer in answers:
        places = re.findall(r'\[(\w+)\]\(\1\.ipynb\), ("[^"]+"(?:(?:, | and )"[^"]+")*)', answer)
        assert places, answer
        for page, sections in places:
            prose = "\n".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
            for section in re.findall('"([^"]+)"', sections): assert re.search(rf"^#+ {re.escape(section)}$", prose, re.M), (page, section)


def test_entrances_name_commands_that_exist():
    parser = (ROOT / "revela_nb" / "cli.py").read_text(encoding="utf-8")
    for page in ("index", "documents", "gpus"):
        for command in re.findall(r"^(?:.*&& )?revela (\w+)", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.M):
            assert f'"{command}"' in parser, f"docs/{page}.md names revela {command}"


def test_the_widget_and_the_tour_agree(pages):
    "The page without JavaScript shows the figures that 00_tour prints for row 0 at temperature 0.1."
    printed = re.search(r"row 0 at τ = 0\.1: (\[.*?\])", shown_text(pages["00_tour.html"]))
    shown = [cell.get_text() for cell in pages["temperature.html"].select('td[data-cell^="0,"]')]
    assert [f"{x:.2f}" for x in ast.literal_eval(printed[1])][1:] == shown[1:]


@pytest.fixture(scope="module")
def address(site):
    "The site, served on this machine."
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args): pass                                    # a browser that hangs up early
    server = Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium from the system's packages, driven by playwright."
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need pip's playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium: pytest.skip("browser tests need Chromium: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (375, "dark")])
def test_pages_load_quietly_and_do_not_scroll_sideways(browser, address, pages, width, scheme):
    context, faults = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme), []
    page = context.new_page()
    page.on("console", lambda m: faults.append((page.url, m.text)) if m.type == "error" else None)
    page.on("pageerror", lambda e: faults.append((page.url, str(e))))
    page.on("response", lambda r: faults.append((page.url, r.url, r.status)) if r.status >= 400 else None)
    for name in pages:
        page.goto(f"{address}/{name}")
        wide = page.evaluate("document.documentElement.scrollWidth")
        if wide > width: faults.append((name, f"{wide} px wide"))
        small = page.evaluate("[...document.querySelectorAll('article math')].filter(m => m.getBoundingClientRect().height < 4 && m.offsetParent).length")
        if small: faults.append((name, f"{small} formulas without height"))
        empty = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth && i.offsetParent).map(i => i.src)")
        if empty: faults.append((name, empty))
    context.close()
    assert not faults


CONTRAST = """() => {
  const numbers = s => { const m = s.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const over = (top, under) => under.map((v, i) => v * (1 - top[3]) + top[i] * top[3]);
  const light = c => c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((a, v, i) => a + v * [.2126, .7152, .0722][i], 0);
  const paper = e => { let c = [255, 255, 255]; const up = []; for (; e; e = e.parentElement) up.unshift(numbers(getComputedStyle(e).backgroundColor)); up.forEach(x => c = over(x, c)); return c; };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), faint = [];
  let seen = 0;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
    if (!text || !e.offsetParent || e.closest("noscript, script, style, .visually-hidden")) continue;
    const style = getComputedStyle(e), b = paper(e), f = over(numbers(style.color), b), [x, y] = [light(f), light(b)];
    const ratio = (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
    seen += 1;
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) faint.push([ratio.toFixed(2), e.tagName, e.className, text.slice(0, 40)]);
  }
  return { seen, faint };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_paper(browser, address, scheme):
    "WCAG AA: a contrast of 4.5 to 1, for large text 3 to 1."
    page = browser.new_page(color_scheme=scheme)
    for name in ("index", "temperature", "04_attention", "19_cli", "api/attention", "glossary"):
        page.goto(f"{address}/{name}.html")
        found = page.evaluate(CONTRAST)
        assert found["seen"] > 50 and not found["faint"], name
    page.add_style_tag(content="article p { color: #888 !important; background: #999 !important; }")
    assert page.evaluate(CONTRAST)["faint"], "the check itself finds nothing"
    page.close()


def test_the_slider_moves_the_picture(browser, address):
    page = browser.new_page(viewport={"width": 800, "height": 900})
    page.goto(f"{address}/temperature.html")
    state = lambda: page.locator("td[data-cell]").all_inner_texts()
    width = lambda: page.evaluate("document.querySelector('[data-bar=\"1\"] .tau-fill').getBoundingClientRect().width")
    start, before, wide = page.locator("#tau-widget").screenshot(), state(), width()
    page.focus("#tau-slider")
    page.keyboard.press("Home")                                                # the smallest temperature, by keyboard
    assert page.inner_text("#tau-value") == "1.0e-4"
    rows = [state()[6 * i:6 * i + 6] for i in range(6)]
    assert all("1.00" in r and r[i] == "–" for i, r in enumerate(rows))
    assert width() > wide and page.locator("#tau-widget").screenshot() != start and state() != before
    page.keyboard.press("End")                                                 # the largest
    assert all(0.15 < float(x) < 0.25 for x in state() if x != "–")
    page.click('[data-tau="0.1"]')
    assert state() == before
    page.click('.tau-row[data-row="3"]')
    assert page.inner_text("#tau-title") == "Chunk 3 reads:" and page.locator('[data-bar="3"] .tau-value').inner_text() == "out"
    page.close()


def test_search_finds_in_batch_attention(browser, address):
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.fill(".sidebar-search", "in-batch attention")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a")
    assert any("Glossary" in t or "attention" in t.lower() for t in page.locator("#search-results li a").all_inner_texts())
    page.close()


def test_light_and_dark(browser, address):
    for scheme, light in (("light", True), ("dark", False)):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{address}/00_tour.html")
        red = int(re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
        assert (red > 200) == light
        page.close()


def test_module_names_in_code_do_not_look_like_links(browser, address):
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(f"{address}/05_patching.html")
        look = page.evaluate("[...document.querySelectorAll('.highlight .nn')].map(e => [getComputedStyle(e).textDecorationLine, getComputedStyle(e).color, getComputedStyle(e.parentElement).color])")
        assert look and all(line == "none" and color == around for line, color, around in look)
        page.close()


def test_drawings_do_not_glare_in_the_dark(browser, address):
    for scheme, turned in (("light", False), ("dark", True)):
        page = browser.new_page(color_scheme=scheme)
        for name, picture in (("05_patching", "doubled_batch.png"), ("06_model", "gradient_route.png"), ("00_tour", "/pipeline.png")):
            page.goto(f"{address}/{name}.html")
            assert ("invert" in page.evaluate(f"getComputedStyle(document.querySelector('article img[src$=\"{picture}\"]')).filter")) == turned
        page.close()


def test_on_a_phone_pictures_and_the_tour_s_formulas_are_whole(browser, address, pages):
    page, cut = browser.new_page(viewport={"width": 375, "height": 800}), []
    for name in pages:
        page.goto(f"{address}/{name}")
        cut += [(name, *found) for found in page.evaluate("""[...document.querySelectorAll('article img')].filter(i => i.offsetParent && (i.getBoundingClientRect().right > innerWidth || i.parentElement.scrollWidth > i.parentElement.clientWidth + 1 && !i.closest('a'))).map(i => [i.src, i.width])""")]
        if name == "00_tour.html": cut += page.evaluate("[...document.querySelectorAll('.math-block')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)")
    page.close()
    assert not cut
