"""The playground in a real Chromium, against the real service."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from service import KEY, Service, photo

from alit.images.encode import encode_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:
    """The playground with the key given; whatever the page itself does wrong fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if not at_home(request.url, service) else None)
    page.goto(service.url)
    expect(page.locator("#alert")).to_contain_text("Authorization: Bearer KEY")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("nano")
    yield page
    context.close()
    assert [words for words in wrong if "status of 401" not in words] == []


def at_home(url: str, service: Service) -> bool:
    return url.startswith((service.url + "/", "data:", "blob:"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "it's a 100% photo.jpg"  # a name that a shell and printf would stumble over
    path.write_bytes(photo(7, 90))
    return path


def answer_of(http: httpx.Client, picture: Path, criterion: str) -> dict:
    asked = {"images": [{"data": base64.b64encode(picture.read_bytes()).decode()}], "criterion": criterion}
    return http.post("/v1/encode", json=asked).raise_for_status().json()["results"][0]


def shown_ids(page: Page) -> list[int]:
    return json.loads(page.locator("#ids").text_content() or "")


def test_playground_choices_agree_with_the_service(page: Page, picture: Path, http: httpx.Client) -> None:
    """Lengths and ids chosen on the page equal those that the service chooses."""
    page.set_input_files("#file", picture)
    expect(page.locator("#status")).to_have_text(f"{picture.name} is encoded.")
    expect(page.locator("#original-caption")).to_contain_text("90\u00a0\u00d7\u00a097")
    pictures = set()
    for index, length in enumerate((16, 32, 48, 64)):
        page.locator("#length").fill(str(index))
        expect(page.locator("#reconstruction-caption")).to_contain_text(f"From {length} tokens")
        pictures.add(page.locator("#reconstruction").get_attribute("src"))
        assert shown_ids(page) == answer_of(http, picture, f"fixed:{length}")["ids"]
    assert len(pictures) == 4
    for measure, thresholds in {
        "l1": (0.02, 0.05, 0.15),
        "psnr": (12, 21, 60),
        "ssim": (0.2, 0.9),
        "mse": (0.02,),
    }.items():
        page.locator(f"#criterion-{measure}").check()
        for threshold in thresholds:
            page.locator("#threshold-number").fill(str(threshold))
            own = answer_of(http, picture, f"{measure}:{threshold}")
            expect(page.locator(f"#chosen-{measure}")).to_contain_text(f"{own['num_tokens']} tokens")
            expect(page.locator("#curve-chosen")).to_have_attribute("data-tokens", str(own["num_tokens"]))
            words = "are enough" if own["satisfied"] else "No length reaches"
            expect(page.locator("#choice")).to_contain_text(words)
            assert shown_ids(page) == own["ids"]


def test_playground_copies_and_downloads_the_answer(page: Page, picture: Path, tmp_path: Path) -> None:
    """The copied ids, the downloaded file and the copied curl command give the service's answer."""
    page.set_input_files("#file", picture)
    page.locator("#copy-ids").click()
    expect(page.locator("#copied-ids")).to_have_text("Copied")
    ids = shown_ids(page)
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == ids
    with page.expect_download() as download:
        page.locator("#download").click()
    told = json.loads(download.value.path().read_text())
    (result,) = told["results"]
    assert ids in [length["ids"] for length in result["every_length"]]
    assert download.value.suggested_filename == "it's a 100% photo.alit.json"
    page.locator("#copy-curl").click()
    expect(page.locator("#copied-curl")).to_have_text("Copied")
    command = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in command
    ran = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | {"ALIT_KEY": KEY}, capture_output=True, check=True
    )
    assert json.loads(ran.stdout)["results"][0]["ids"] == ids


def test_playground_reports_files_that_are_no_images(page: Page, picture: Path, tmp_path: Path) -> None:
    """A file that is no image is reported, and the page keeps working."""
    (tmp_path / "notes.jpg").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.jpg")
    expect(page.locator("#alert")).to_contain_text("“notes.jpg”")
    expect(page.locator("#alert")).to_contain_text("expected a JPEG")
    (tmp_path / "notes.txt").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.txt")
    expect(page.locator("#alert")).to_contain_text("is not an image (text/plain)")
    (tmp_path / "huge.png").write_bytes(encode_image(np.zeros((1100, 1100, 3), np.uint8)))
    page.set_input_files("#file", tmp_path / "huge.png")
    expect(page.locator("#alert")).to_contain_text("pixels")
    page.set_input_files("#file", picture)
    expect(page.locator("#alert")).to_be_empty()
    expect(page.locator("#status")).to_contain_text("is encoded")


def test_playground_works_with_the_keyboard_alone(page: Page) -> None:
    """Every control of the page can be reached and used with the keyboard."""

    def tab_to(identifier: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == identifier:
                return
        raise AssertionError(f"#{identifier} is not reached with Tab")

    page.locator("#file").focus()
    tab_to("sample-texture")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("texture.png is encoded.")
    tab_to("length")
    page.keyboard.press("Home")
    expect(page.locator("#reconstruction-caption")).to_contain_text("From 16 tokens")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#reconstruction-caption")).to_contain_text("From 32 tokens")
    assert page.locator("#length").get_attribute("aria-valuetext").startswith("32 tokens")
    tab_to("criterion-l1")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#criterion-mse")).to_be_checked()
    expect(page.locator("#threshold-label")).to_have_text("Threshold of MSE")
    tab_to("threshold")
    page.keyboard.press("End")
    expect(page.locator("#choice")).to_contain_text("MSE ≤ 0.05")
    tab_to("tokens")
    before = page.locator("#token-caption").text_content()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-caption")).to_contain_text("Token 2 of")
    assert page.locator("#token-caption").text_content() != before
    tab_to("copy-ids")
    page.keyboard.press("Enter")
    expect(page.locator("#copied-ids")).to_have_text("Copied")


def test_playground_accepts_dropped_and_pasted_images(page: Page, picture: Path) -> None:
    """An image can be dropped or pasted, and the attention map follows the token under the pointer."""
    data = base64.b64encode(picture.read_bytes()).decode()
    hand = """([kind, name, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
        const options = { bubbles: true, cancelable: true };
        document.body.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: transfer })
            : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
    }"""
    for kind in ("drop", "paste"):
        page.evaluate(hand, [kind, f"{kind}.jpg", data])
        expect(page.locator("#status")).to_have_text(f"{kind}.jpg is encoded.")
    heats = set()
    for token in range(3):
        page.locator(f"#token-{token}").hover()
        expect(page.locator("#token-caption")).to_contain_text(f"Token {token + 1} of")
        heats.add(page.evaluate("document.getElementById('heat').toDataURL()"))
    assert len(heats) == 3


def test_playground_keeps_the_key_in_memory_only(page: Page) -> None:
    """The key is in no storage of the browser and is gone after a reload."""
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{},{},""]'
    page.reload()
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#key")).to_have_value("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_playground_fits_the_window(page: Page, scheme: str, width: int) -> None:
    """The page fits narrow and wide windows in both color schemes."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.locator("#sample-shapes").click()
    expect(page.locator("#results")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(n) for n in background.strip("rgb()").split(",")[:3]) > 384
    assert light == (scheme == "light")
    if folder := os.environ.get("ALIT_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"playground-{scheme}-{width}.png", full_page=True)
