"""A visitor's own model, quantized by the real worker: a budget, a single file, a name on the hub that is or is not in the local cache."""

import json
import re
import shutil

import pytest

from qgen.io.into import load_peer
from qgen.nn.packed import Packed
from qgen.web.app import Settings
from tests.web.test_page import QUANTIZE

pytest.importorskip("diffusers", reason="the shipped model is a diffusers pipeline: install qgen-diffusion[diffusers]")
gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the shipped pipeline as folder, as single file, as a broken file, and as a copy in the hub's cache."""
    from qgen.assets import assets_dir

    folder, source = tmp_path_factory.mktemp("root"), assets_dir() / "emoji-pixart"
    shutil.copytree(source, folder / "pipe")
    shutil.copy(source / "transformer" / "diffusion_pytorch_model.safetensors", folder / "one.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\x08" + bytes(7) + b"not json")
    for name, part in (("pipe", source), ("bare", source / "transformer")):
        copy = folder / "hub" / f"models--owner--{name}"
        shutil.copytree(part, copy / "snapshots" / ("0" * 40))
        (copy / "refs").mkdir()
        (copy / "refs" / "main").write_text("0" * 40)
    return folder


@pytest.fixture(scope="module")
def call(serve_page, root):
    """A function: (job as JSON, result as HTML) of a quantize job with these changes; or whatever else the page offers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(root / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with serve_page(Settings(root / "work", (root,), hub=True, prepare=False), real=True) as (_, address, _script):
            client = gradio_client.Client(address, verbose=False)

            def made(api="/quantize", **changes):
                if api != "/quantize":
                    return client.predict(*changes.values(), api_name=api)
                answer = client.predict(*(QUANTIZE | changes).values(), api_name=api)
                return client.predict(answer[0], api_name="/job"), answer[3]

            yield made


def test_a_budget_makes_a_smaller_model_than_none_and_says_so(call):
    """Between the widest and the narrowest that the recipe's formats allow; the number typed is a bound."""
    job, html = call(recipe="rtn-int4", budget="4 bits", samples=2, keep=1, steps=2)
    said = next(line for line in job["log"] if "allocated for 4 bits" in line)
    assert 3 < float(re.search(r"([\d.]+) bits per weight", said)[1]) <= 4
    formats = {row["spec"] for row in job["result"]["rows"] if row["spec"] != "float"}
    assert len(formats) > 1 and "--budget '4 bits'" in job["result"]["command"] and "Worst layers" in html


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": "lots"}, "A budget is text such as '4.5 bits'"),
        ({"budget": "-3 bits"}, "(?i)budget"),
        ({"model": "one.safetensors", "budget": "4 bits"}, "leave the budget empty"),
        ({"model": "one.safetensors", "recipe": "svdquant-int4"}, "(?i)calibrat|activations"),
        ({"model": "broken.safetensors"}, "broken.safetensors"),
        ({"model": "owner/absent"}, "(?i)no folder 'owner/absent' here, and Hugging Face's hub did not give it"),
    ],
    ids=["words", "negative", "file-budget", "file-recipe", "broken", "hub"],
)
def test_what_cannot_be_is_said_in_words(call, changes, words):
    with pytest.raises(Exception, match=words) as caught:
        call(**changes)
    assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_single_file_is_converted_saved_and_inspected(call, root, make_demo_pipe):
    job, _ = call(model="one.safetensors", recipe="rtn-w4a16", skip="*.proj_out")
    assert job["result"]["totals"]["quantized"] == 50 and "qgen convert" in job["result"]["command"]
    call("/save", job_id=job["id"], path="kept")
    assert "uint4_g64" in call("/inspect", model="shipped:rtn-int4", path="kept")[2]
    transformer = load_peer(root / "work" / "saved" / "kept" / "model.safetensors", into=make_demo_pipe().transformer)
    assert sum(isinstance(layer, Packed) for layer in transformer.modules()) == 50
    with pytest.raises(Exception, match=r"holds neither model_index\.json"):
        call(
            "/generate", prompt="x", model=f"job:{job['id']}", seed=1, new=False, steps=1, guidance=3, w=0, h=0, gain=4
        )


@pytest.mark.parametrize("model", ["pipe", "owner/pipe", "owner/bare"])
def test_a_folder_and_names_whose_files_lie_in_the_hubs_cache(call, model):
    job, _ = call(model=model, recipe="rtn-int4")
    assert job["state"] == "done" and job["result"]["totals"]["quantized"] >= 50
    assert json.dumps(model) in json.dumps(job["asked"]) and job["result"]["command"].startswith("qgen quantize")
