"""Quantize CLIP on a text encoder of ComfyUI's own, with random weights, in ComfyUI's Python: there is no node that saves conditioning."""

import json
import subprocess

import pytest

from tests import comfy_server
from tests.nodes import graphs

WHERE = comfy_server.asked()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(WHERE, str), reason=WHERE if isinstance(WHERE, str) else ""),
]
CODE = """
import importlib.util, json, sys
root, sys.argv = sys.argv[1], ["x", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, torch
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from qgen.nodes.clip import BITS, quantize_clip
from qgen.nodes.report import rows_of
torch.manual_seed(0)
clip = comfy.sd.load_text_encoder_state_dicts([{}], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
for name, p in clip.cond_stage_model.named_parameters():
    if p.ndim == 1:
        torch.nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
    elif p.ndim:
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)

def encoded(c):
    return c.encode_from_tokens(c.tokenize("a red fox in fresh snow"))[0].float()

def db(a, b):
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))

plain, found = encoded(clip), {}
for bits in BITS:
    made, = quantize_clip(clip, bits)
    summary = rows_of(made)
    found[bits] = {"db": db(plain, encoded(made)), "ratio": summary.totals["ratio"], "quantized": summary.totals["quantized"]}
key = next(k for k in clip.patcher.model_state_dict() if k.endswith("q_proj.weight"))
w = clip.patcher.model_state_dict()[key]
patch = {key: ("diff", (0.5 * torch.randn(w.shape) * w.std(),))}
made, = quantize_clip(clip, "8-bit integers")
before = encoded(made)
worn, dressed = made.clone(), clip.clone()
assert worn.add_patches(patch, 1.0) == [key] and dressed.add_patches(patch, 1.0) == [key]
wanted, got = encoded(dressed), encoded(worn)
found["lora"] = {"change": db(wanted - plain, got - before), "back": bool(torch.equal(encoded(made), before))}
found["kept"] = bool(torch.equal(encoded(clip), plain))
print(json.dumps(found))
"""


def test_an_encoder_with_packed_weights_says_what_the_plain_one_says_and_wears_patches():
    command = [str(WHERE[1]), "-c", CODE, str(graphs.ROOT)]
    done = subprocess.run(command, cwd=WHERE[0], capture_output=True, text=True, env=comfy_server.clean(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    four, nvfp4, eight, fp8 = (found[bits] for bits in list(found)[:4])
    assert eight["db"] > fp8["db"] > four["db"] > 8 and nvfp4["db"] > 8
    assert all(one["quantized"] == 72 for one in (four, nvfp4, eight, fp8))
    assert four["ratio"] > eight["ratio"] > 1.3
    assert found["kept"] and found["lora"]["back"] and found["lora"]["change"] > 10
