"""ComfyUI's front end in a headless Chromium. Every request that leaves this machine is refused."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tests import comfy_server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def why_not() -> str:
    """The reason why it cannot be opened here, "" if it can."""
    for found in (comfy_server.asked(), comfy_server.front()):
        if isinstance(found, str):
            return found
    if not CHROMIUM:
        return "no Chromium here: apt-get install chromium"
    return "" if importlib.util.find_spec("playwright") else "no Playwright here: pip install playwright"


@contextmanager
def opened(server: comfy_server.Server, size: tuple[int, int] = (1600, 900)) -> Iterator:
    """A page of the server, its nodes loaded. `page.broken` lists the errors of its scripts."""
    from playwright.sync_api import sync_playwright

    home = f"http://127.0.0.1:{server.port}/"
    here = (home, "data:", "blob:")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.broken = []
        page.on("pageerror", lambda error: page.broken.append(str(error)))
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(here) else route.abort())
        page.goto(home)
        page.wait_for_function(
            "!!(window.app?.graph && window.LiteGraph?.registered_node_types?.QGenReport)", timeout=120_000
        )
        # the workflow that it starts with comes last: before it, it would cover what a test loads
        page.wait_for_function("app.graph._nodes.length > 0", timeout=120_000)
        yield page
        browser.close()
