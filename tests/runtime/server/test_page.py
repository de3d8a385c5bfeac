"""The page at /: served whole and closed to everything else, and, in a real Chromium, what a user sees of it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from obsdiff.runtime.server.app import PAGE
from obsdiff.runtime.server.schemas import ImageRequest
from server import Server, add_key_file, wait_for

from .browser import CHROMIUM, Browser, browse

FILES = {"index.html": "text/html", "style.css": "text/css", "page.js": "text/javascript"}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def test_the_page_is_served_and_may_load_nothing_else(server: Server) -> None:
    assert {path.name for path in PAGE.iterdir()} == FILES.keys()
    for name, kind in FILES.items():
        answer = server.http.get("/" if name == "index.html" else f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.text == (PAGE / name).read_text()


def test_the_page_holds_all_that_it_needs() -> None:
    for name in FILES:
        text = (PAGE / name).read_text()
        assert not re.search(r"https?:|url\(|@import|<style|\sstyle=|\son\w+=|innerHTML", text), name
    page = (PAGE / "index.html").read_text()
    for linked in re.findall(r'(?:src|href)="([^"/:]+)"', page):
        assert (PAGE / linked).is_file()


def test_every_input_has_a_label_and_every_id_that_the_script_asks_for_exists() -> None:
    page, script = (PAGE / "index.html").read_text(), (PAGE / "page.js").read_text()
    ids = set(re.findall(r'\sid="([\w-]+)"', page))
    labelled = set(re.findall(r'<label for="([\w-]+)"', page)) | {"previews"}  # inside its label
    assert set(re.findall(r'<(?:input|textarea) id="([\w-]+)"', page)) == labelled <= ids
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= ids


def test_what_is_no_file_of_the_page_is_not_there(server: Server) -> None:
    for path in ("/nowhere", "/%00", "/..%2fapp.py", "/%2e%2e/app.py", "/x" * 500):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    for method in ("POST", "PUT", "DELETE"):
        assert server.http.request(method, "/nowhere").status_code == 404


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browse(tmp_path_factory.mktemp("chromium")) as started:
        yield started


STATUS = "document.querySelector('#status')?.textContent"
LOADED = "document.querySelector('#draw')?.disabled === false"
PICTURES = "[...document.images].filter((i) => i.complete && i.naturalWidth).map((i) => i.naturalWidth)"


@needs_chromium
def test_both_models_draw_side_by_side(server: Server, browser: Browser) -> None:
    browser.said.clear()
    browser.open(f"{server.url}/?prompt=a+red+ankle+boot&seed=7&steps=3&width=48&previews=1&draw=1")
    browser.until(f"{STATUS}?.startsWith('Drawn')")
    assert browser.until(f"({PICTURES}).length === 2 && {PICTURES}") == [48, 48]
    text = browser.get("document.body.innerText")
    assert text.count("seed 7") == 2
    assert re.search(r"Drawn: plain \d+\.\d\d× as fast as one-block", text)
    assert browser.get("document.images[0].src") == browser.get("document.images[1].src")  # the same model, two ways
    assert browser.said == []


@needs_chromium
def test_the_page_sends_what_the_schema_takes(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}/?prompt=a+bag&seed=9007199254740991&steps=4&guidance=2.5&height=32&previews=1")
    browser.until(LOADED)
    sent = browser.get("fields(models[1])")
    whole = {"model": "plain", "prompt": "a bag", "seed": 2**53 - 1, "n": 1, "stream": True, "partial_images": 8}
    assert sent == whole | {"num_inference_steps": 4, "guidance_scale": 2.5, "size": "32x32"}
    assert ImageRequest(**sent).model_dump(exclude_none=True) == sent
    assert sent.keys() <= ImageRequest.model_fields.keys()


@needs_chromium
def test_enter_draws_and_escape_cancels(server: Server, browser: Browser) -> None:
    browser.open(f"{server.url}/?prompt=a+bag&steps=150")
    browser.until(LOADED)
    assert browser.get("document.activeElement.id") == "prompt"
    gone = server.metric("obsdiff_requests_total", status="499")
    browser.press("Enter")
    browser.until("document.querySelector('.note')?.textContent.startsWith('Step')")
    browser.press("Escape")
    browser.until(f"{STATUS} === 'Cancelled.'")
    assert browser.get("document.querySelector('.save').hidden")
    browser.until(LOADED)
    wait_for(lambda: server.metric("obsdiff_requests_total", status="499") > gone)


@needs_chromium
@pytest.mark.parametrize(
    ("query", "words"),
    [("prompt=+", "Say what to draw."), ("steps=151", "Steps: "), ("height=17", "Height: "), ("seed=-1", "Seed: ")],
)
def test_what_cannot_be_drawn_is_said_before_it_is_sent(
    server: Server, browser: Browser, query: str, words: str
) -> None:
    browser.open(f"{server.url}/?{query}&draw=1")
    browser.until(f"{STATUS}?.startsWith('{words}')")
    assert browser.get("document.activeElement.getAttribute('aria-invalid')") == "true"
    assert browser.get("document.querySelectorAll('figure').length") == 0


@needs_chromium
def test_an_error_of_the_api_is_shown_in_its_words(server: Server, browser: Browser) -> None:
    browser.open(server.url)
    browser.until(LOADED)
    browser.get("models[1].id = 'gone'")
    browser.press("Enter")
    browser.until(f"{STATUS} === 'There is no such model; there are: one-block, plain.'")
    assert browser.get("document.querySelector('#status').classList.contains('bad')")
    assert browser.get(f"({PICTURES}).length") == 1  # the first model's stays


@needs_chromium
def test_a_key_is_asked_for_only_where_one_is_needed(
    server: Server, browser: Browser, graphless: Path, tmp_path: Path
) -> None:
    browser.open(server.url)
    browser.until(LOADED)
    assert browser.get("document.querySelector('#key-field').hidden")
    locked = Server(graphless, "--api-key-file", add_key_file(tmp_path, "sesame"))
    try:
        browser.open(locked.ready().url)
        browser.until(f"{STATUS} === 'This server wants an API key.'")
        for key, words in (("wrong", "The server does not know this API key."), ("sesame", "Drawn in")):
            browser.until("document.activeElement.id === 'key'")
            browser.get("document.querySelector('#key').value = ''")
            browser.call("Input.insertText", text=key)
            browser.press("Enter")
            browser.until(f"{STATUS}?.startsWith('{words}')")
    finally:
        locked.kill()


@needs_chromium
def test_a_phone_needs_no_sideways_scrolling(server: Server, browser: Browser) -> None:
    browser.screen(320, 640, mobile=True)
    browser.open(f"{server.url}/?prompt=a+bag&steps=2&draw=1")
    browser.until(f"{STATUS}?.startsWith('Drawn')")
    assert browser.get("document.documentElement.scrollWidth") <= 320
