"""The page in a real browser: every tab clicked through as a person would, with no error in the console and no request to anywhere else.

Wants Playwright (`pip install playwright`) and a Chromium: QGEN_CHROMIUM, one on the path, or Playwright's own. In the folder that
QGEN_SCREENSHOTS names, a picture of every tab on every screen is kept, for people to look at.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from qgen.web.app import Settings
from tests.web.test_page import QUANTIZE

pytest.importorskip("diffusers", reason="the shipped model is a diffusers pipeline: install qgen-diffusion[diffusers]")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by Playwright: pip install playwright"
)


pytestmark = pytest.mark.slow

FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
PATIENCE = 600_000  # ms; a machine may be busy
TABS = ("Generate", "Quantize", "Evaluate", "Inspect", "Gallery")


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("QGEN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=found, args=FLAGS.split())
        except sync_api.Error as error:
            pytest.skip(
                f"no Chromium here ({str(error).splitlines()[0][:120]}): install one, or name it in QGEN_CHROMIUM"
            )
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(serve_page, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    with serve_page(Settings(root / "work", (root,), prepare=False), real=True) as (_, where, _script):
        yield where


class Visitor:
    """A page, and everything that went wrong on it."""

    def __init__(self, browser, screen, address):
        self.address, self.wrong = address, []
        self.context = browser.new_context(**SCREENS[screen])
        self.context.route("**/*", self._only_here)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda m: m.type == "error" and self.wrong.append(f"console: {m.text}"))
        self.page.on("pageerror", lambda e: self.wrong.append(f"page: {e}"))
        self.open()

    def _only_here(self, route):
        if route.request.url.startswith((self.address, "data:", "blob:")):
            return route.continue_()
        self.wrong.append(f"request to {route.request.url}")
        return route.abort()

    def open(self):
        self.page.goto(self.address)
        self.page.wait_for_selector("#draw")

    def tab(self, name):
        """As a person does: the tab, or on a narrow screen the menu that holds it."""
        found = self.page.get_by_role("tab", name=name, exact=True).locator("visible=true")
        if not found.count():
            self.page.locator(".overflow-menu > button").click()
            found = self.page.locator(".overflow-dropdown button", has_text=name)
        found.first.click()

    def done(self, tab):
        self.page.wait_for_selector(f"#{tab}-status .chip.done")

    def keep(self, name):
        if os.environ.get("QGEN_SCREENSHOTS"):
            self.page.screenshot(path=Path(os.environ["QGEN_SCREENSHOTS"]) / f"{name}.png", full_page=True)


@pytest.fixture
def visit(browser, address):
    opened = []

    def made(screen="desktop"):
        opened.append(Visitor(browser, screen, address))
        return opened[-1]

    yield made
    for visitor in opened:
        visitor.context.close()
        assert not visitor.wrong, visitor.wrong


def test_generate_cancel_reload_and_toast(visit):
    v = visit()
    page = v.page
    page.fill("#prompt textarea", "flat penguin")
    page.click("#draw")
    v.done("draw")
    page.wait_for_selector("#slider img")
    assert page.locator("#slider img").count() == 2 and page.locator("#difference img").count() == 1
    assert re.search(r"\d dB", page.inner_text("#facts"))
    job = page.inner_text("#draw-status")
    v.open()  # a reload: prompt, pictures and job are there again
    v.done("draw")
    page.wait_for_selector("#slider img")
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'flat penguin'")
    assert page.inner_text("#draw-status") == job
    page.fill("#prompt textarea", " ")
    page.click("#draw")
    assert "prompt" in page.get_by_test_id("toast-body").first.inner_text()
    page.fill("#prompt textarea", "noto owl")
    page.click("#settings button")
    page.fill("#steps input[type=number]", "100")
    page.press("#steps input[type=number]", "Tab")
    page.click("#draw")
    page.wait_for_selector("#draw-status .chip.running")
    page.click("#cancel-draw")
    page.wait_for_selector("#draw-status .chip.cancelled")


def test_quantize_inspect_and_save(visit):
    v = visit()
    page = v.page
    v.tab("Quantize")
    page.click("#recipe input")
    page.get_by_role("option", name="rtn-w4a16").click()
    page.wait_for_function("document.querySelector('#recipe-about').innerText.includes('uint4_g64')")
    page.click("#quantize")
    v.done("quantize")
    assert "quantizing" in page.input_value("#quantize-log textarea")
    page.wait_for_selector("#quantize-result td")
    assert page.locator("#quantize-files a").count() >= 3
    page.fill("#save-path input, #save-path textarea", "mine")
    page.click("#save")
    page.wait_for_function("document.querySelector('#saved').innerText.includes('Saved to')")
    v.tab("Inspect")
    page.click("#inspect-model input")
    page.get_by_role("option", name=re.compile("rtn-w4a16")).click()
    page.click("#inspect")
    page.wait_for_selector("#inspect-page .heat td")
    assert page.locator("#inspect-page .heat tbody tr").count() > 40
    page.fill("#inspect-path input, #inspect-path textarea", "mine")
    page.click("#inspect")
    v.done("inspect")


def test_evaluate(visit):
    v = visit()
    page = v.page
    v.tab("Evaluate")
    page.fill("#evaluate-n input[type=number]", "4")
    page.fill("#evaluate-steps input", "4")
    page.press("#evaluate-steps input", "Tab")
    page.click("#evaluate")
    v.done("evaluate")
    page.wait_for_selector("#plots svg")
    assert "PSNR" in page.inner_text("#scores") and page.locator("#worst img").count() == 4
    text = re.sub(r"\s", "", page.inner_text("#evaluate-files"))  # a name's stem and ending stand in two elements
    assert all(name in text for name in ("scores.csv", "scores.json", "report.html"))
    with page.expect_download() as download:
        page.locator("#evaluate-files a").first.click()
    assert "psnr" in Path(download.value.path()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def with_heat(address):
    """A model that has a heat map by timestep, as one types it into a list of models."""
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    asked = {**QUANTIZE, "recipe": "rtn-w4a16", "heat": True}
    return f"job:{client.predict(*asked.values(), api_name='/quantize')[0]}"


def filled(v, name, with_heat):
    """The tab as it is when its work is done."""
    page = v.page
    v.tab(name)
    if name == "Generate":
        page.click("#draw")
        v.done("draw")
        page.wait_for_selector("#difference img")
    if name == "Quantize":
        page.click("#recipe input")
        page.get_by_role("option", name="rtn-w4a16").click()
        page.click("#quantize-settings button")
        page.uncheck("#heat input")
        page.click("#quantize")
        v.done("quantize")
        page.wait_for_selector("#quantize-result td")
    if name == "Evaluate":
        page.fill("#evaluate-n input[type=number]", "3")
        page.fill("#evaluate-steps input", "2")
        page.press("#evaluate-steps input", "Tab")
        page.click("#evaluate")
        v.done("evaluate")
        page.wait_for_selector("#plots svg")
    if name == "Inspect":
        page.fill("#inspect-model input", with_heat)
        page.press("#inspect-model input", "Enter")
        page.click("#inspect")
        page.wait_for_selector("#inspect-page .heat td")
    if name == "Gallery":
        page.click("#gallery-draw")
        v.done("gallery")
    page.wait_for_timeout(500)


@pytest.mark.parametrize("screen", SCREENS)
def test_every_tab_fits_the_screen_and_can_be_read(visit, screen, with_heat):
    """No sideways scrolling, text that stands out from its ground by 4.5 to 1 (WCAG AA), and names in the heat map that are told apart."""
    v = visit(screen)
    page = v.page
    for name in TABS:
        filled(v, name, with_heat)
        v.keep(f"{screen}-{name.lower()}")
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["viewport"]["width"], name
        weak = page.evaluate(CONTRAST)
        assert not weak, (name, weak)
        if name == "Inspect":
            names = page.locator("#inspect-page .heat tbody th")
            assert names.count() > 40 and len(set(names.all_inner_texts())) == names.count()
            assert not page.evaluate(CLIPPED), "a layer's name is cut off"


def test_the_keyboard_reaches_everything(visit):
    v = visit()
    page = v.page
    seen = set()
    page.focus("#prompt textarea")
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("(document.activeElement.closest('[id]') || {}).id || ''"))
        if {"draw", "cancel-draw", "position"} <= seen | {page.evaluate(NEAREST)}:
            break
        seen.add(page.evaluate(NEAREST))
    assert {"draw", "cancel-draw", "model", "position"} <= seen
    page.focus("#draw")
    page.keyboard.press("Enter")
    v.done("draw")
    page.get_by_role("tab", name="Generate", exact=True).first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#quantize", state="visible")


NEAREST = """() => { for (let e = document.activeElement; e; e = e.parentElement)
    if (['draw', 'cancel-draw', 'model', 'position', 'settings'].includes(e.id)) return e.id; return ''; }"""

CLIPPED = """() => [...document.querySelectorAll('#inspect-page .heat tbody th')]
    .filter(e => e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1).map(e => e.innerText)"""

# Texts of our own markup whose contrast with the nearest painted ground is below 4.5.
CONTRAST = """() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const lum = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > .99) return c; }
    return [255, 255, 255]; };
  const weak = [];
  for (const e of document.querySelectorAll('.q span, .q td, .q th, .q p, .q b, .q h2, #title p')) {
    if (!e.innerText || !e.offsetParent || e.children.length) continue;
    const a = lum(rgb(getComputedStyle(e).color)), b = lum(ground(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) weak.push([e.innerText.slice(0, 40), ratio.toFixed(2)]);
  }
  return weak.slice(0, 8);
}"""
