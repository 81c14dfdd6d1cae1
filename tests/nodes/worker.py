"""Runs in ComfyUI's own Python, on ComfyUI's own code: quantizes small random models and writes what was seen as JSON.

python worker.py <folder of ComfyUI> <root of this checkout> <scenario> <empty folder>
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

COMFY, ROOT, SCENARIO, BASE = sys.argv[1:5]
sys.argv = ["worker", "--cpu"]
sys.path.insert(0, COMFY)

import torch  # noqa: E402

torch.set_num_threads(1)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402

spec = spec_from_file_location("qgen", f"{ROOT}/qgen/__init__.py", submodule_search_locations=[f"{ROOT}/qgen"])
sys.modules["qgen"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["qgen"])
spec = spec_from_file_location("tests", f"{ROOT}/tests/__init__.py", submodule_search_locations=[f"{ROOT}/tests"])
sys.modules["tests"] = module_from_spec(spec)

from qgen.nodes.attention import attention  # noqa: E402
from qgen.nodes.load import load  # noqa: E402
from qgen.nodes.quantize import quantize  # noqa: E402
from qgen.nodes.save import save  # noqa: E402
from tests.nodes import graphs  # noqa: E402

for name in ("diffusion_models", "qgen"):
    (Path(BASE) / name).mkdir()
folder_paths.models_dir = BASE
folder_paths.folder_names_and_paths["diffusion_models"] = ([f"{BASE}/diffusion_models"], {".safetensors"})

FLUX = SCENARIO.startswith("flux")
STATE = graphs.flux() if FLUX else graphs.unet()
torch.manual_seed(0)
TEXT = [[torch.randn(1, 8, 1024), {"pooled_output": torch.randn(1, 768)} if FLUX else {}]]
LATENT = {"samples": torch.zeros(1, 16 if FLUX else 4, 8, 8)}
CALIBRATED = {"positive": TEXT, "latent": LATENT, "steps": 2, "runs": 2}


def model(dtype=torch.bfloat16):
    return comfy.sd.load_diffusion_model_state_dict({name: t.to(dtype) for name, t in STATE.items()})


def draw(patcher, steps=2, seed=1):
    noise = comfy.sample.prepare_noise(LATENT["samples"], seed)
    return comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", TEXT, TEXT, LATENT["samples"], disable_pbar=True, seed=seed
    )


def with_lora(patcher, *loras):
    for state, strength in loras:
        patcher = comfy.sd.load_lora_for_models(patcher, None, state, strength, 0)[0]
    return patcher


def base():
    """Quantize, calibrate, again, save and load."""
    plain = model()
    want = draw(plain)
    seen = {}
    for recipe in ("rtn-w4a16", "rtn-int4", "w8a8" if FLUX else "fp8"):
        given = CALIBRATED if recipe == "w8a8" else {}
        (made,) = quantize(plain, recipe, **given)
        seen[f"cosine {recipe}"] = graphs.cosine(draw(made), want)
    (made,) = quantize(plain, "w4a8" if FLUX else "rtn-int4", **(CALIBRATED if FLUX else {}))
    got = draw(made)
    seen["cosine calibrated"] = graphs.cosine(got, want)
    seen["size"] = made.model_size() / plain.model_size()
    seen["repeats"] = torch.equal(draw(made), got)
    seen["input unchanged"] = torch.equal(draw(plain), want)
    (again,) = quantize(plain, "w4a8" if FLUX else "rtn-int4", **(CALIBRATED if FLUX else {}))
    seen["cached"] = again.model is made.model
    file = save(made, "kept").values[0]
    (loaded,) = load(file)
    seen["loaded is equal"] = torch.equal(draw(loaded), got)
    seen["class"] = type(made.model.diffusion_model).__name__ == type(plain.model.diffusion_model).__name__
    return seen


def lora():
    """LoRAs and other patches on a quantized model, compared with the same on the float one."""
    plain = model()
    (made,) = quantize(plain, "rtn-w4a16")
    base = draw(made)
    first = graphs.lora(STATE, "attn.qkv" if FLUX else "attn1.to_q", size=4.0)
    second = graphs.lora(STATE, "mlp.0" if FLUX else "ff.net.0.proj", rank=8, size=3.0)
    one, two = with_lora(made, (first, 1.0)), with_lora(made, (first, 0.7), (second, -0.9))
    drawn = draw(two)
    seen = {
        "moved": graphs.cosine(draw(with_lora(plain, (first, 0.7), (second, -0.9))), draw(plain)),
        "base": graphs.cosine(base, draw(plain)),
        "one": graphs.cosine(draw(one), draw(with_lora(plain, (first, 1.0)))),
        "two": graphs.cosine(drawn, draw(with_lora(plain, (first, 0.7), (second, -0.9)))),
        "zero is exact": torch.equal(draw(with_lora(made, (first, 0.0))), base),
        "back is exact": torch.equal(draw(made), base),
        "again is exact": torch.equal(draw(two), drawn),
    }
    name = "double_blocks.0.img_mlp.2" if FLUX else "middle_block.1.transformer_blocks.0.ff.net.2"
    weight = STATE[f"{name}.weight"]
    change = {f"diffusion_model.{name}.diff": 0.7 * torch.randn(weight.shape) * weight.std()}
    seen["difference"] = graphs.cosine(draw(with_lora(made, (change, 1.0))), draw(with_lora(plain, (change, 1.0))))
    layer = made.model.get_submodule(f"diffusion_model.{name}")
    wrapped = made.clone()
    wrapped.add_weight_wrapper(f"diffusion_model.{name}.weight", lambda w: w * 0)
    comfy.model_management.load_models_gpu([wrapped])
    layer.weight_function = [lambda w: w * 0]  # as ComfyUI sets it on layers that wait elsewhere
    x = torch.randn(2, layer.k)
    seen["weight function"] = bool(torch.allclose(layer(x), layer.bias.to(x.dtype).expand(2, -1)))
    layer.weight_function = []
    layer.set_weight(torch.ones(layer.n, layer.k))
    seen["override"] = bool(torch.allclose(layer(x), x.sum(1, keepdim=True) + layer.bias.to(x.dtype), atol=1e-3))
    layer.weight = layer.weight
    seen["override ends"] = torch.equal(draw(made), base)
    return seen


def rest():
    """Attention, interruption, refusals, exports."""
    plain = model()
    want = draw(plain)
    seen = {}
    for numbers in ("int8", "fp4"):
        (made,) = attention(plain, numbers, False)
        got = draw(made)
        seen[f"attention {numbers}"] = graphs.cosine(got, want)
        seen[f"attention {numbers} is another"] = not torch.equal(got, want)
    seen["attention within no budget"] = torch.equal(draw(attention(plain, "fp4", True, 0.001)[0]), want)
    late = draw(attention(plain, "fp4", False, 0.05, 0.3, 1.0)[0])
    seen["attention late"] = not torch.equal(late, want) and graphs.cosine(late, want) > seen["attention fp4"]

    seen["interrupted"] = []
    for when in (10, 120):  # layers that have run: while calls are recorded, and while they are replayed
        left = when

        def stop(module, args):
            nonlocal left
            left -= isinstance(module, torch.nn.Linear)
            if left == 0:
                comfy.model_management.interrupt_current_processing()

        hook = torch.nn.modules.module.register_module_forward_pre_hook(stop)
        try:
            quantize(plain, "w4a8", seed=when, **CALIBRATED)
            seen["interrupted"].append(False)
        except comfy.model_management.InterruptProcessingException:
            seen["interrupted"].append(True)
        finally:
            hook.remove()
            comfy.model_management.interrupt_current_processing(False)
    seen["unchanged after it"] = torch.equal(draw(plain), want)
    seen["refusals"] = []
    for call in (
        lambda: quantize(plain, "w4a8"),
        lambda: save(plain, "x"),
        lambda: save(quantize(plain, "rtn-int4")[0], "../x"),
        lambda: load("../x.safetensors"),
        lambda: attention(plain, start_percent=0.5, end_percent=0.2),
    ):
        try:
            call()
            seen["refusals"].append("none")
        except ValueError as error:
            seen["refusals"].append(str(error))
    (made,) = quantize(plain, "rtn-nvfp4")
    got = draw(made)
    for form, name in (("ComfyUI: nvfp4", "nvfp4"), ("ComfyUI: int8", "int8"), ("ComfyUI: convrot_w4a4", "convrot")):
        file = save(made, name, form, "diffusion_models").values[0]
        stock = comfy.sd.load_diffusion_model(f"{BASE}/diffusion_models/{file}")
        seen[f"stock {name}"] = graphs.cosine(draw(stock), got)
        seen[f"own {name}"] = graphs.cosine(draw(load(file)[0]), got)
    file = save(made, "lite", "nunchaku-lite (diffusers)").values[0]
    seen["nunchaku-lite"] = graphs.cosine(draw(load(file)[0]), got)
    return seen


def timed():
    """Scales that follow the timestep."""
    from qgen.nn import clock

    plain = model()
    want = draw(plain, 4)
    (made,) = quantize(plain, "temporal-int4", **(CALIBRATED | {"steps": 4}))
    got = draw(made, 4)
    module = made.model.diffusion_model
    layers = [layer for layer in module.modules() if getattr(layer, "timed", False)]
    seen = {"cosine": graphs.cosine(got, want), "layers": len(layers)}
    seen["wound"] = all(layer.clock is module.qgen_clock for layer in layers)
    bins = {int(b) for t in (0.0, 1.0) for b in _bins_at(clock, module, layers[0], t)}
    seen["bins"] = len(bins)
    try:
        save(made, "timed")
    except ValueError as error:
        seen["file"] = str(error)
    return seen


def _bins_at(clock, module, layer, t):
    module.qgen_clock.t = torch.tensor([t])
    return clock._bins(layer, torch.zeros(1, 1, layer.k))


print("SEEN " + json.dumps({"base": base, "lora": lora, "rest": rest, "timed": timed}[SCENARIO.partition("-")[2]]()))
