"""The real front end of ComfyUI in a headless Chromium: nodes are shown and connected, a prompt is queued by its button, a picture appears.

Every request that leaves this machine is refused. Screenshots go to the test's folder, for a person to look at.
"""

import importlib.util
import json
import shutil

import pytest

from tests import comfy_server
from tests.nodes import graphs

WHERE, FRONT = comfy_server.asked(), comfy_server.front()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WHY = next((reason for reason in (WHERE, FRONT) if isinstance(reason, str)), "")
WHY = WHY or ("" if CHROMIUM else "no Chromium here: apt-get install chromium")
WHY = WHY or ("" if importlib.util.find_spec("playwright") else "no Playwright here: pip install playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY or "-")]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.ColorPalette": "light"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("browser")
    (base / "user" / "default").mkdir(parents=True)
    (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS))
    graphs.models(base, WHERE)
    with comfy_server.Server(base, packs=[graphs.ROOT], front=FRONT) as running:
        yield running


@pytest.fixture
def page(server):
    from playwright.sync_api import sync_playwright

    home = f"http://127.0.0.1:{server.port}/"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1600, "height": 900})
        shown.broken = []
        shown.on("pageerror", lambda error: shown.broken.append(str(error)))
        here = (home, "data:", "blob:")
        shown.route("**/*", lambda route: route.continue_() if route.request.url.startswith(here) else route.abort())
        shown.goto(home)
        shown.wait_for_function(
            "!!(window.app?.graph && window.LiteGraph?.registered_node_types?.QGenReport)", timeout=120_000
        )
        yield shown
        browser.close()


def test_nodes_are_shown_connected_queued_and_the_picture_appears(server, page):
    graph = {
        "1": graphs.node("QGenLoadPipeline", pipeline="built-in emoji demo", dtype="float32"),
        "2": graphs.node(
            "QGenQuantizePipeline", pipe=["1", 0], recipe="rtn-int4", prompts="noto owl", steps=4, samples=1, seed=0
        ),
        "3": graphs.node("QGenReport", model=["2", 0], order="worst first", layers=12),
        "5": graphs.node("PreviewImage", images=["3", 0]),
        "6": graphs.node("PreviewImage", images=["4", 0]),
    }
    told = {"prompt": "noto owl", "negative_prompt": "", "seed": 1, "steps": 12, "guidance": 3.0}
    graph["4"] = graphs.node("QGenSamplePipeline", pipe=["2", 0], **told, width=0, height=0, count=1, preview=True)
    page.evaluate("graph => app.loadApiJson(graph, 'bridge')", graph)
    page.wait_for_function("app.graph._nodes.length == 6")
    links = page.evaluate(
        "app.graph._nodes.flatMap(n => n.inputs.filter(i => i.link != null).map(i => n.type + '.' + i.name))"
    )
    assert sorted(links) == [
        *(
            "PreviewImage.images",
            "PreviewImage.images",
            "QGenQuantizePipeline.pipe",
            "QGenReport.model",
            "QGenSamplePipeline.pipe",
        )
    ]
    page.evaluate("app.graph.arrange(60); app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.get_by_role("button", name="Run", exact=True).first.click()
    page.wait_for_function(
        "app.graph._nodes.filter(n => n.type == 'PreviewImage' && n.imgs?.length).length == 2", timeout=180_000
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=server.base / "drawn.png")
    sizes = page.evaluate("app.graph._nodes.filter(n => n.imgs?.length).map(n => n.imgs[0].naturalWidth)")
    assert sorted(sizes) == [64, 1100]
    assert not page.broken


def test_every_workflow_opens_and_becomes_a_prompt_that_names_every_input(server, page):
    info = server.ask("/object_info")
    for path in sorted((graphs.ROOT / "example_workflows").glob("*.json")):
        flow = graphs.workflow(path.name)
        page.evaluate("flow => app.loadGraphData(flow)", flow)
        page.wait_for_function("count => app.graph._nodes.length == count", arg=len(flow["nodes"]))
        made = page.evaluate("async () => (await app.graphToPrompt()).output")
        assert len(made) == len(flow["nodes"])
        for one in made.values():
            wanted = info[one["class_type"]]["input"]
            known = {*wanted.get("required", {}), *wanted.get("optional", {})}
            assert set(wanted.get("required", {})) <= set(one["inputs"]) <= known, (path.name, one)
            if one["class_type"].startswith("QGen"):
                assert set(one["inputs"]) == known, (path.name, one["class_type"])
    assert not page.broken


def test_the_help_page_opens_in_the_front_end(server, page):
    text = page.evaluate(
        "async root => (await fetch(`/extensions/${root}/docs/QGenQuantizeModel.md`)).text()", graphs.ROOT.name
    )
    assert text.startswith("# Quantize Model")
