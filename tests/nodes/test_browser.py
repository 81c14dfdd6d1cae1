"""The real front end of ComfyUI in a headless Chromium: nodes are shown and connected, a prompt is queued by its button, a picture appears.

Every request that leaves this machine is refused. Screenshots go to the test's folder, for a person to look at.
"""

import pytest

from tests.nodes import graphs
from tests.nodes.front import opened, why_not

WHY = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY), reason=WHY or "-")]


@pytest.fixture(scope="module")
def browser(server):
    with opened(server) as page:
        yield page


@pytest.fixture
def page(browser):
    browser.broken.clear()
    return browser


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
    page.wait_for_function(  # a picture is fetched when its node is drawn, and a busy machine draws late
        "app.graph.setDirtyCanvas(true, true) || "
        "app.graph._nodes.filter(n => n.type == 'PreviewImage' && n.imgs?.length).length == 2",
        timeout=400_000,
    )
    page.wait_for_timeout(1500)
    page.screenshot(path=server.base / "drawn.png")
    sizes = page.evaluate("app.graph._nodes.filter(n => n.imgs?.length).map(n => n.imgs[0].naturalWidth)")
    assert sorted(sizes) == [64, 1100]
    assert not page.broken


def fits(value, kind, told):
    """Whether a widget's value is one that the server takes; of files, which are not here, only that it is a name."""
    if isinstance(value, list):  # a link
        return True
    if kind == "COMBO" or isinstance(kind, list):
        choices = told.get("options", kind)
        return value in choices or (isinstance(value, str) and value.endswith(".safetensors"))
    kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
    low, high = told.get("min"), told.get("max")
    right = isinstance(value, kinds.get(kind, object)) and (kind == "BOOLEAN" or not isinstance(value, bool))
    return right and (low is None or value >= low) and (high is None or value <= high)


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
                fields = {**wanted.get("required", {}), **wanted.get("optional", {})}
                wrong = [name for name, value in one["inputs"].items() if not fits(value, *fields[name])]
                assert not wrong, (path.name, one["class_type"], wrong)
    assert not page.broken


def test_the_help_page_opens_in_the_front_end(server, page):
    text = page.evaluate(
        "async root => (await fetch(`/extensions/${root}/docs/QGenQuantizeModel.md`)).text()", graphs.ROOT.name
    )
    assert text.startswith("# Quantize Model")
