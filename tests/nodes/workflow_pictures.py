"""Draws the pictures of example_workflows anew: each workflow as the real front end shows it.

    python -m tests.nodes.workflow_pictures

Needs what the tests in test_browser.py need. Look at the pictures afterwards.
"""

import io
import os
import tempfile
from pathlib import Path

from tests import comfy_server
from tests.nodes import graphs
from tests.nodes.front import opened

NAMED = {  # files of the workflows: they are never opened here, but the front end marks those that are absent
    "diffusion_models": ("flux1-dev.safetensors",),
    "text_encoders": ("clip_l.safetensors", "t5xxl_fp16.safetensors"),
    "vae": ("ae.safetensors",),
    "loras": ("style.safetensors", "subject.safetensors"),
    "qgen": ("flux1-dev-4bit.safetensors",),
}
WIDTH = 1600  # of a picture, at most
MARGIN, LEFT, TOP = 24, 120, 160  # px around the graph; of the front end's own bars
PLACE = """([left, top, margin]) => {
    const nodes = app.graph._nodes, ends = nodes.map(n => [n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
    const x = Math.min(...nodes.map(n => n.pos[0])), y = Math.min(...nodes.map(n => n.pos[1])) - 50;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset[0] = left + margin - x;
    app.canvas.ds.offset[1] = top + margin - y;
    app.graph.setDirtyCanvas(true, true);
    return [Math.max(...ends.map(e => e[0])) - x, Math.max(...ends.map(e => e[1])) - y];
}"""


def draw(page, flow: dict, target: Path) -> None:
    from PIL import Image

    page.evaluate("flow => app.loadGraphData(flow)", flow)
    page.wait_for_function("count => app.graph._nodes.length == count", arg=len(flow["nodes"]))
    page.wait_for_timeout(1500)
    width, height = page.evaluate(PLACE, [LEFT, TOP, MARGIN])
    page.wait_for_timeout(1500)
    clip = {"x": LEFT, "y": TOP, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    with Image.open(io.BytesIO(page.screenshot(clip=clip))) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        picture.save(target, quality=88, optimize=True)


def main() -> None:
    os.environ["QGEN_COMFY_TEST"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        graphs.settings(base)
        for kind, names in NAMED.items():
            for name in names:
                (base / "models" / kind).mkdir(parents=True, exist_ok=True)
                (base / "models" / kind / name).touch()
        pack = base / "qgen"  # nodes wear the name of their pack's folder
        pack.symlink_to(graphs.ROOT, target_is_directory=True)
        with (
            comfy_server.Server(base, packs=[pack], front=comfy_server.front()) as server,
            opened(server, (3400, 1700)) as page,
        ):
            for path in sorted((graphs.ROOT / "example_workflows").glob("*.json")):
                draw(page, graphs.workflow(path.name), path.with_suffix(".jpg"))
                print(path.with_suffix(".jpg").name)


if __name__ == "__main__":
    main()
