"""The page: what it shows, what it escapes, whom it refuses."""
import shutil, socket, threading, time

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


def test_in_chromium():
    api, uvicorn = pytest.importorskip("playwright.sync_api"), pytest.importorskip("uvicorn")
    chromium = shutil.which("chromium")
    if not chromium: pytest.skip("there is no chromium")
    with socket.socket() as free: free.bind(("127.0.0.1", 0)); port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(make_app(searchers()), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True); thread.start()
    end = time.time() + 20
    while not server.started and time.time() < end: time.sleep(0.05)
    try:
        with api.sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page, faults = browser.new_page(), []
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" and "favicon" not in message.text and "404" not in message.text else None)
            page.goto(f"http://127.0.0.1:{port}/")
            page.fill("input[name=q]", NASTY); page.press("input[name=q]", "Enter")
            page.wait_for_selector("pre")
            assert page.inner_text("pre") == NASTY and page.title() == "revela" and page.locator("section").count() == 2
            assert page.input_value("input[name=q]") == NASTY and page.locator("img").count() == 0
            browser.close()
    finally: server.should_exit = True; thread.join(10)
