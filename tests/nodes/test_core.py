"""Quantize, Save, Load, LoRA and Attention on ComfyUI's own code, in its own Python, with small random models on the CPU.

The distance of a cosine from 1 may be a third larger than what was measured, so that a wrong scale, order or sign shows.
"""

import json
import subprocess

import pytest

from tests import comfy_server
from tests.nodes.graphs import ROOT

WHERE = comfy_server.asked()
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
    seen = json.loads(found[-1].removeprefix("SEEN "))
    assert seen.pop("outside") == []  # no network, nothing unpickled
    return seen


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


def test_a_budget_mixes_precisions_and_attention_comes_along(tmp_path):
    seen = run("flux-budget", tmp_path)
    small, large, good = seen["4.6 bits"], seen["6 bits"], seen["sqnr>=24"]
    assert 4.4 < small["bits"] <= 4.6 and 5.5 < large["bits"] <= 6.0 and good["bytes"] < large["bytes"]
    assert 0 < small["changed"] < large["changed"]
    above(small, {"cosine": 0.9966})
    above(large, {"cosine": 0.9990})
    above(good, {"cosine": 0.9988})
    for fact in ("cached", "input unchanged", "loaded is equal", "attention is another"):
        assert seen[fact] is True, fact
    above(seen, {"attention": 0.99999})
    for refusal, words in zip(
        seen["refusals"], ("connect positive", "such as '4.5 bits'", "cannot be met"), strict=True
    ):
        assert "budget" in refusal and words in refusal


def test_files_of_gguf_and_nunchaku_keep_their_values(tmp_path):
    seen = run("flux-files", tmp_path)
    above(seen, {"gguf Q8_0": 0.99998, "gguf Q4_0": 0.9989, "nunchaku": 0.9994, "nunchaku is close": 0.9942})
    assert seen["renamed by ComfyUI"] is True
    assert seen["gguf Q8_0 values"] > 0.999999 and seen["gguf Q4_0 values"] > 0.999999
    assert all("16-bit layer there" in line or "rounded to bfloat16" in line for line in seen["said"])


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_a_model_that_does_not_fit_the_device_computes_the_same(family, tmp_path):
    seen = run(f"{family}-lowvram", tmp_path)
    facts = ("lowvram", "equal", "lora did something", "whole again", "after unloading", "base is back")
    for fact in facts:
        assert seen[fact] is True, fact
    assert seen["left"] > 0 and seen["freed"] > 1 << 20


def test_decoders_draw_pictures_without_nan_in_every_way_that_the_node_offers(tmp_path):
    seen = run("flux-vae", tmp_path)
    assert len(seen["decoded"]) == 8 and all(0 < error < 0.05 for error in seen["decoded"].values()), seen["decoded"]
    assert all(same == ("encoder" not in name) for name, same in seen["encoded"].items())
    assert seen["input unchanged"] is True
    assert seen["nan"].startswith("BadData") and "NaN" in seen["nan"]


def test_scales_follow_the_noise_level_that_comfyui_is_at_and_survive_a_file(tmp_path):
    seen = run("flux-timed", tmp_path)
    assert seen["layers"] == seen["loaded is timed"] > 4 and seen["moving"] > 0 and seen["bins"] == 4
    for fact in ("wound", "clock follows sigmas", "sigmas win", "loaded is equal", "back is exact"):
        assert seen[fact] is True, fact
    above(seen, {"cosine": 0.994, "lora": 0.965, "difference": 0.993, "override": 0.998})
    assert seen["worn"] > 0.99999  # of the same numbers, in a file
    assert seen["refused"].startswith("format: ") and "tables over timesteps" in seen["refused"]
