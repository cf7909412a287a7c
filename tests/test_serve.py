"""The page: what it shows, what it escapes, whom it refuses."""
import os, shutil, signal, socket, subprocess, sys, threading, time, urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette"); pytest.importorskip("httpx")
from starlette.testclient import TestClient

from revela_nb.serve import check_host, make_app

NASTY = '<img src=x onerror="document.title=1">'


def searchers(): return {"dense": lambda query, k: [("a.txt:3", NASTY, 0.25)][:k], "<b>": lambda query, k: []}


def test_page_shows_both_and_escapes():
    page = TestClient(make_app(searchers()), base_url="http://127.0.0.1:8000").get("/", params={"q": NASTY})
    assert page.status_code == 200 and "<img" not in page.text and "<b></b>" not in page.text and "&lt;b&gt;" in page.text
    assert "0.250" in page.text and "a.txt:3" in page.text and "nothing found" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.1", "localhost.evil", ""])
def test_foreign_hosts_are_refused(host):
    assert TestClient(make_app(searchers())).get("/", headers={"host": host}).status_code == 403
    with pytest.raises(ValueError, match="this machine only"): check_host(host)


@pytest.fixture
def address():
    "The page, served for real on a free loopback port; the uvicorn thread is stopped afterwards."
    uvicorn = pytest.importorskip("uvicorn")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(searchers()), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    end = time.time() + 20
    while not server.started and time.time() < end: time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True; thread.join(10)


def test_in_chromium(address):
    "By keyboard alone: the box has the focus, Enter asks, both columns answer; on a phone's width nothing sticks out; the console stays empty."
    api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not chromium: pytest.skip("there is no chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, said, failed = browser.new_page(viewport={"width": 1280, "height": 800}), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(address)
        assert page.evaluate("document.activeElement.name") == "q" and page.get_by_role("textbox", name="question").count() == 1
        page.keyboard.type(NASTY); page.keyboard.press("Enter")
        page.wait_for_selector("pre")
        assert page.inner_text("pre") == NASTY and page.title() == "revela" and page.locator("img").count() == 0
        assert page.input_value("input[name=q]") == NASTY and page.locator("small").all_inner_texts() == ["0.250"]
        left, right = (section.bounding_box() for section in page.locator("section").all())
        assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"], "the columns stand side by side"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "BUTTON"
        page.set_viewport_size({"width": 375, "height": 700})
        left, right = (section.bounding_box() for section in page.locator("section").all())
        assert page.evaluate("document.documentElement.scrollWidth") <= 375 and right["y"] >= left["y"] + left["height"]
        page.goto(f"{address}?q=") # an empty question shows the empty page
        assert page.locator("section").count() == 0
        browser.close()
    assert (said, failed) == ([], [])


def test_missing_libraries_are_named(monkeypatch, capsys):
    "Without the extra, `revela serve` says what to install and gives status 2."
    from revela_nb.cli import main
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ImportError, match=r"revela_nb\[serve\]"): make_app({})
    assert main(["serve", "bm25", "--corpus", __file__]) == 2 and "pip install 'revela_nb[serve]'" in capsys.readouterr().err


def test_the_command_for_real(tmp_path):
    "`revela serve` as a process: it answers on the loopback address and ends with Ctrl-C."
    pytest.importorskip("uvicorn")
    (tmp_path / "notes").mkdir(); (tmp_path / "notes" / "pets.txt").write_text("The cat sat on the mat.\n\nDogs bark.\n")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    words = [sys.executable, "-m", "revela_nb.cli", "serve", "bm25", "--corpus", "notes", "--port", str(port), "--max-words", "6"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.Popen(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        end, body = time.time() + 150, ""
        while not body and time.time() < end and done.poll() is None:
            try: body = urllib.request.urlopen(f"http://127.0.0.1:{port}/?q=cat", timeout=5).read().decode()
            except OSError: time.sleep(0.2)
        assert "The cat sat" in body and "pets.txt:1" in body and body.count("<section>") == 1, (body, done.poll())
        done.send_signal(signal.SIGINT)
        assert done.wait(20) in (0, 130) and "Traceback" not in done.stderr.read()
    finally: done.kill(); done.stderr.close()
