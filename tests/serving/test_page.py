"""The page in a real browser: Debian's Chromium, as there is no other that a test can count on."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving_model import Running, run_server

from tinysft_jax.data.prepare import main as prepare
from tinysft_jax.sampling import decode
from tinysft_jax.sampling import engine as engine_module

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="there is no /usr/bin/chromium: the page is not tested")
WAIT_MS = 20_000
runs: list[float] = []  # when the server ran a decode step


@pytest.fixture(scope="module")
def slow_server() -> Iterator[Running]:
    """Some twenty tokens a second, none of which ends an answer."""
    advance, patch = decode.advance, pytest.MonkeyPatch()

    def slow(*arguments):
        time.sleep(0.05)
        runs.append(time.monotonic())
        return advance(*arguments)

    patch.setattr(decode, "advance", slow)
    patch.setattr(engine_module, "SECONDS_OF_RUN", 0.0)  # a token a run
    with run_server(ends=False, n_slots=2) as running:
        yield running
    patch.undo()


@pytest.fixture
def page(slow_server) -> Iterator:
    from playwright.sync_api import sync_playwright

    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(slow_server.url)
        yield page
        browser.close()
    assert not complaints


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_MS / 1e3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def messages(page) -> list[str]:
    return page.locator("#log .message .text").all_inner_texts()


def test_a_conversation(page, slow_server, tmp_path):
    """An answer streams and is stopped; a reload keeps it; a retry replaces it; the saved file can be trained on."""
    runs.clear()
    page.locator("#input").fill("tell me a story")
    page.keyboard.press("Enter")
    until(lambda: len(messages(page)) == 2 and messages(page)[1])
    begun = messages(page)[1]
    until(lambda: len(messages(page)[1]) > len(begun) + 3)
    page.locator("#stop").click()
    until(lambda: slow_server.engine.n_active == 0)
    assert len(runs) < 100, "the answer went on after its client had gone: it has room for 160 tokens"
    question, answer = messages(page)
    assert question == "tell me a story" and answer.startswith(begun)
    assert "(stopped)" in page.locator("#log .note").last.inner_text()
    page.reload()
    until(lambda: messages(page) == [question, answer])
    page.locator("#retry").click()
    until(lambda: messages(page)[1] and messages(page)[1] != answer and len(messages(page)[1]) > 2)
    page.keyboard.press("Escape")
    until(lambda: slow_server.engine.n_active == 0)
    with page.expect_download() as download:
        page.locator("#save").click()
    path = tmp_path / "conversation.jsonl"
    download.value.save_as(path)
    (line,) = path.read_text().splitlines()
    saved = [message["content"] for message in json.loads(line)["messages"]]
    assert saved == messages(page)
    prepare([f"--input={path}", f"--output={tmp_path / 'data'}", "--workers=1", "--valid_fraction=0"])
    ledger = json.loads((tmp_path / "data" / "ledger.json").read_text())
    assert ledger["splits"]["train"]["tasks"]["chat"]["kept"] == 1


def test_a_story_with_my_words(page):
    page.locator("#words-open").click()
    for number, word in enumerate(("cat", "tree", "happy"), start=1):
        page.locator(f"#word-{number}").fill(word)
    page.locator("#words-send").click()
    until(lambda: len(messages(page)) == 2)
    assert messages(page)[0] == "Write a short story that uses all of these words: cat, tree, happy"
    page.locator("#stop").click()


def test_a_phone_shows_no_more_than_its_width(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#input").fill("a" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
