"""Quantize, Save, Load, LoRA and Attention on ComfyUI's own code, in its own Python, with small random models on the CPU.

The distance of a cosine from 1 may be a third larger than what was measured, so that a wrong scale, order or sign shows.
"""

import json
import subprocess

import pytest

from tests import comfy_server
from tests.nodes.graphs import ROOT

WHERE = comfy_server.found()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(WHERE, str), reason=WHERE if isinstance(WHERE, str) else ""),
]


def run(scenario, folder):
    """What worker.py saw."""
    comfy, python = WHERE
    told = subprocess.run(
        [python, ROOT / "tests" / "nodes" / "worker.py", comfy, ROOT, scenario, folder],
        capture_output=True, text=True, timeout=900, env=comfy_server.clean(),
    )  # fmt: skip
    found = [line for line in told.stdout.splitlines() if line.startswith("SEEN ")]
    assert found, told.stderr[-3000:]
    return json.loads(found[-1].removeprefix("SEEN "))


def above(seen, floors):
    low = {name: seen[name] for name, floor in floors.items() if not floor < seen[name] < 1}
    assert not low, low


FLUX = {"cosine rtn-w4a16": 0.9938, "cosine rtn-int4": 0.993, "cosine w8a8": 0.9945, "cosine calibrated": 0.9943}
UNET = {"cosine rtn-w4a16": 0.9907, "cosine rtn-int4": 0.9755, "cosine fp8": 0.9984, "cosine calibrated": 0.9755}


@pytest.mark.parametrize("family, floors", [("flux", FLUX), ("unet", UNET)], ids=["flux", "unet"])
def test_quantizing_leaves_the_input_alone_is_kept_and_survives_a_file(family, floors, tmp_path):
    seen = run(f"{family}-base", tmp_path)
    above(seen, floors)
    assert seen["size"] < 0.35  # of float32 here; embedders and heads stay float
    for fact in ("repeats", "input unchanged", "cached", "loaded is equal", "class"):
        assert seen[fact] is True, fact


@pytest.mark.parametrize("family, base", [("flux", 0.9938), ("unet", 0.9907)], ids=["flux", "unet"])
def test_loras_and_other_patches_do_what_they_do_on_the_float_model(family, base, tmp_path):
    seen = run(f"{family}-lora", tmp_path)
    assert seen["moved"] < 0.92 < seen["two"]  # the LoRAs matter, and the quantized model follows them
    above(seen, {"base": base, "one": 0.98, "two": 0.95, "difference": base - 0.01})
    facts = ("zero is exact", "back is exact", "again is exact", "weight function", "override", "override ends")
    for fact in facts:
        assert seen[fact] is True, fact


def test_attention_interruption_refusals_and_exports(tmp_path):
    seen = run("flux-rest", tmp_path)
    above(seen, {"attention int8": 0.99999, "attention fp4": 0.9999})
    facts = ("attention int8 is another", "attention fp4 is another", "attention within no budget", "attention late")
    for fact in (*facts, "unchanged after it"):
        assert seen[fact] is True, fact
    assert seen["interrupted"] == [True, True]
    for refusal, field in zip(
        seen["refusals"], ("recipe: ", "model: ", "name: ", "file: ", "start_percent: "), strict=True
    ):
        assert refusal.startswith(field)
    above(seen, {"stock nvfp4": 0.9995, "stock int8": 0.9995, "stock convrot": 0.996, "nunchaku-lite": 0.9998})
    above(seen, {"own nvfp4": 0.9995, "own int8": 0.9995, "own convrot": 0.996})


def test_scales_follow_the_timestep_that_comfyui_is_at(tmp_path):
    seen = run("flux-timed", tmp_path)
    assert seen["layers"] > 4 and seen["bins"] == 2
    assert seen["wound"] is True
    assert "tables over timesteps" in seen["file"]  # no file of parts holds them, and it says so
    above(seen, {"cosine": 0.99})
