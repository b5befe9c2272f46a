"""The page at /, as a person uses it: by mouse, by keyboard, on a phone, in the dark, with a key.

Playwright drives Debian's chromium, which ``make chromium`` installs. With VZIP_SCREENSHOTS=FOLDER
the tests leave pictures of the page there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.runtime.llm.demo_llm import demo_with_llm
from tests.runtime.service.serving import SCENES, Served, served

pytestmark = pytest.mark.slow

KEY = "a-key-of-some-length"
QUESTIONS = ("What digit is there?", "What colour is the digit?")
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
# The network flags keep Chromium from looking up hosts of its maker's.
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
)  # fmt: skip

Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with served(demo_with_llm(), llm=True) as each:
        yield each


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "there is no chromium here: 'make chromium' installs Debian's"
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Browser, demo: Served) -> Iterator[Opened]:
    """Open the page; whatever it asks of another host, or complains of, fails the test."""
    contexts, foreign, faults = [], [], []

    def open_page(size: dict[str, int] = DESK, url: str = demo.url, **options: Any) -> Page:
        context = browser.new_context(viewport=size, reduced_motion="reduce", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: foreign.append(request.url)
                if not request.url.startswith((url, "blob:", "data:")) else None)  # fmt: skip
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not foreign
    assert not faults


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("VZIP_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def show(page: Page, picture: Path = SCENES[0]) -> None:
    page.locator("#file").set_input_files(picture)
    expect(page.locator("#caption")).to_contain_text("of 196 patches are kept")


def ask(page: Page, question: str, number: int = 0) -> str:
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    box = page.locator(".answer").nth(number)
    expect(box).not_to_have_class("said answer waiting")
    return box.locator("span").nth(1).inner_text()


def answers(demo: Served, picture: Path) -> list[str]:
    from vzip.runtime import VisionEncoder

    with VisionEncoder.open(demo.service.bundle, threads=1) as encoder:
        tokens = encoder.image_tokens(picture)
    conversation = demo.web.answering.llm.conversation([getattr(tokens, "embeds", tokens)])
    return [conversation.ask(each) for each in QUESTIONS]


def wide(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def test_a_person_shows_a_picture_and_asks(demo: Served, opened: Opened) -> None:
    page = opened()
    expect(page.locator("#card")).to_contain_text("43 tokens of a picture instead of 196")
    expect(page.locator("#question")).to_be_disabled()
    show(page)
    expect(page.locator("#question")).to_be_focused()
    wanted = answers(demo, SCENES[0])
    for number, question in enumerate(QUESTIONS):
        assert ask(page, question, number) == wanted[number]
    expect(page.locator("#note")).to_contain_text("KV cache")
    expect(page.locator("#savings")).to_contain_text("43 tokens instead of 196: 22 %")
    for name in ("encode", "prefill", "decode"):
        expect(page.locator(f"#{name}")).to_contain_text("ms")
    expect(page.locator("#kv")).to_contain_text("B")
    assert not wide(page)
    screenshot(page, "desk")


def test_what_is_kept_is_drawn_and_can_be_left_out(opened: Opened) -> None:
    page = opened()
    show(page)
    dark = """() => {
        const canvas = document.getElementById("canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let sum = 0;
        for (let at = 0; at < data.length; at += 4) sum += data[at] + data[at + 1] + data[at + 2];
        return sum / data.length;
    }"""
    drawn = page.evaluate(dark)
    page.locator("#patches").uncheck()
    assert page.evaluate(dark) > 1.3 * drawn
    assert "patches are kept" in page.locator("#canvas").get_attribute("aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_in_light_and_dark(opened: Opened, scheme: str) -> None:
    page = opened(PHONE, color_scheme=scheme, has_touch=True)
    show(page)
    ask(page, QUESTIONS[0])
    assert not wide(page)
    small = page.evaluate(
        """() => [...document.querySelectorAll("button, input[type=text], #drop")]
            .filter(each => each.offsetParent && each.getBoundingClientRect().height < 44)
            .map(each => each.id)"""
    )
    assert not small, "too small for a thumb"
    contrast = """() => {
        const light = text => {
            const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(each => {
                const x = each / 255;
                return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
            });
            return .2126 * r + .7152 * g + .0722 * b;
        };
        const behind = each => {
            for (; each; each = each.parentElement) {
                const colour = getComputedStyle(each).backgroundColor;
                if (!/, 0\\)$|transparent|color\\(/.test(colour)) return colour;
            }
            return "rgb(255, 255, 255)";
        };
        return [...document.querySelectorAll("h1, h2, p, dt, dd, button, label, .said, .soft")]
            .filter(each => each.offsetParent && each.textContent.trim() && !each.disabled)
            .map(each => {
                const one = light(getComputedStyle(each).color), two = light(behind(each));
                return [(Math.max(one, two) + .05) / (Math.min(one, two) + .05), each.textContent];
            }).filter(each => each[0] < 4.5);
    }"""
    assert page.evaluate(contrast) == [], "too little contrast to be read"
    screenshot(page, f"phone-{scheme}")


def test_the_keyboard_alone_is_enough(opened: Opened) -> None:
    page = opened()
    show(page)
    page.evaluate("document.activeElement.blur(); window.focus()")
    order = []
    page.locator("body").click(position={"x": 1, "y": 1})
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["file", "camera", "patches", "log", "question", "send"]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert outline != "0px"
    page.keyboard.press("Shift+Tab")
    page.keyboard.type(QUESTIONS[0])
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_be_visible()


def test_a_screen_reader_is_told_what_is_what(opened: Opened) -> None:
    page = opened()
    show(page)
    ask(page, QUESTIONS[0])
    tree = page.locator("body").aria_snapshot()
    for wanted in (
        'heading "Ask about a picture" [level=1]',
        'heading "Questions" [level=2]',
        'log "Questions and answers"',
        'textbox "Your question"',
        'checkbox "Show what is kept" [checked]',
        'button "Ask"',
        "patches are kept as they are",
    ):
        assert wanted in tree, tree
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title()


def test_the_camera(opened: Opened) -> None:
    page = opened(permissions=["camera"])
    page.locator("#camera").click()
    expect(page.locator("#snap")).to_be_focused()
    page.wait_for_function("document.getElementById('video').videoWidth > 0")
    page.locator("#snap").click()
    expect(page.locator("#caption")).to_contain_text("of 196 patches are kept")
    expect(page.locator("#snap")).to_be_hidden()
    assert ask(page, QUESTIONS[0])


def test_a_clip(opened: Opened, tmp_path: Path) -> None:
    import av
    from PIL import Image

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 112
        for scene in SCENES:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_image(Image.open(scene).convert("RGB").resize((112, 112)))
                )
            )
        container.mux(stream.encode())
    page = opened()
    page.locator("#file").set_input_files(path)
    expect(page.locator("#video")).to_be_visible()
    assert ask(page, QUESTIONS[0])
    expect(page.locator("#savings")).to_contain_text("tokens instead of")


def test_what_is_wrong_is_said_and_can_be_mended(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    broken = tmp_path / "a.png"
    broken.write_bytes(b"no picture")
    page.locator("#file").set_input_files(broken)
    expect(page.get_by_role("alert")).to_be_visible()
    show(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    page.locator("#question").fill("<image>?")
    page.locator("#send").click()
    expect(page.get_by_role("alert")).to_contain_text("<image>")
    expect(page.locator("#question")).to_have_value("<image>?")
    assert ask(page, QUESTIONS[0])


def test_the_key_is_asked_for_and_kept_nowhere(opened: Opened) -> None:
    with served(demo_with_llm(), llm=True, api_key=KEY) as each:
        page = opened(url=each.url)
        for given in ("wrong", KEY):
            expect(page.locator("#key")).to_be_focused()
            page.keyboard.type(given)
            page.keyboard.press("Enter")
            if given != KEY:
                expect(page.get_by_role("alert")).to_contain_text("key")
        show(page)
        assert ask(page, QUESTIONS[0])
        stored = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.evaluate(stored) == [0, 0, "", each.url + "/"]
        page.reload()
        expect(page.locator("#key")).to_be_visible()
        page.goto("about:blank")
