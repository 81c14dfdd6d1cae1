"""One ComfyUI server for all tests of the nodes: with the real front end where it is, this checkout, and a pack of somebody else's."""

import shutil

import pytest

from tests import comfy_server
from tests.nodes import graphs


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    graphs.models(base, comfy_server.asked())
    other = base / "other" / "patches-attention"
    shutil.copytree(graphs.ROOT / "tests" / "nodes" / "other_pack", other)
    graphs.settings(base)
    front = comfy_server.front()
    with comfy_server.Server(
        base, packs=[graphs.ROOT, other], front=None if isinstance(front, str) else front
    ) as running:
        yield running
