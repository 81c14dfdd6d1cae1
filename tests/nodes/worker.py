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
import comfy.samplers  # noqa: E402
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

OUTSIDE = []  # what reached for the network, or would have run code out of a file
WATCHED = ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "urllib.Request")
sys.addaudithook(lambda event, args: OUTSIDE.append(f"{event} {args[-2:]}") if event in WATCHED else None)

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


def budget():
    """Mixed precision within a budget, and low-bit attention, from the same node."""
    plain = model()
    want = draw(plain)
    seen = {}
    for text in ("4.6 bits", "6 bits", "sqnr>=24"):
        (made,) = quantize(plain, "rtn-int4", budget=text, **CALIBRATED)
        module = made.model.diffusion_model
        rows = [row for row in module.qgen_report if "allocated" in row.get("why", "")]
        seen[text] = {
            "cosine": graphs.cosine(draw(made), want),
            "changed": len(rows),
            **module.qgen_allocation["reached"],
        }
    (made,) = quantize(plain, "rtn-int4", budget="4.6 bits", **CALIBRATED)
    seen["cached"] = made.model is quantize(plain, "rtn-int4", budget=" 4.6 bits", **CALIBRATED)[0].model
    seen["input unchanged"] = torch.equal(draw(plain), want)
    file = save(made, "mixed").values[0]
    seen["loaded is equal"] = torch.equal(draw(load(file)[0]), draw(made))
    (base,), (low,) = quantize(plain, "rtn-w4a16"), quantize(plain, "rtn-w4a16", attention="int8")
    seen["attention"] = graphs.cosine(draw(low), draw(base))
    seen["attention is another"] = not torch.equal(draw(low), draw(base))
    seen["refusals"] = []
    for call in (
        lambda: quantize(plain, "rtn-int4", budget="4.6 bits"),
        lambda: quantize(plain, "rtn-int4", budget="small", **CALIBRATED),
        lambda: quantize(plain, "rtn-int4", budget="1 bit", **CALIBRATED),
    ):
        try:
            call()
            seen["refusals"].append("none")
        except ValueError as error:
            seen["refusals"].append(str(error))
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


def files():
    """Files of others: GGUF as the `gguf` package writes it, Nunchaku's own file."""
    from dataclasses import replace

    import gguf
    import numpy

    from qgen.io.peers.base import Layer, Model, exporters
    from qgen.nodes.renaming import to_diffusers
    from qgen.nodes.save import parts_of

    plain = model()
    want = draw(plain)
    seen = {}
    for kind in ("Q8_0", "Q4_0"):
        kind_ = gguf.GGMLQuantizationType[kind]
        writer = gguf.GGUFWriter(f"{BASE}/diffusion_models/{kind}.gguf", "flux")
        twin = dict(STATE)
        for name, t in STATE.items():
            if "blocks." in name and t.ndim == 2:
                codes = gguf.quants.quantize(t.bfloat16().float().numpy(), kind_)
                writer.add_tensor(name, codes, raw_dtype=kind_)
                twin[name] = torch.from_numpy(numpy.array(gguf.quants.dequantize(codes, kind_)))
            else:
                writer.add_tensor(name, t.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (loaded,) = load(f"{kind}.gguf", "float32")
        got = draw(loaded)
        truth = comfy.sd.load_diffusion_model_state_dict({name: t.float() for name, t in twin.items()})
        seen[f"gguf {kind}"] = graphs.cosine(got, want)
        seen[f"gguf {kind} values"] = graphs.cosine(got, draw(truth))
    (made,) = quantize(plain, "rtn-int4")
    at = "model.diffusion_model."  # as whole checkpoints call it; ComfyUI takes it off, so layers are found under other names than stored

    def moved(part):
        return replace(part, path=at + part.path) if isinstance(part, Layer) else replace(part, name=at + part.name)

    exporters["qgen"].write(map(moved, parts_of(made)[0]), Path(f"{BASE}/qgen/whole"), about=Model())
    (loaded,) = load("whole/model.safetensors")
    seen["renamed by ComfyUI"] = torch.equal(draw(loaded), draw(made))
    (made,) = quantize(plain, "nunchaku-int4", **CALIBRATED)
    parts, about = to_diffusers(parts_of(made)[0])
    seen["said"] = exporters["nunchaku"].write(parts, Path(f"{BASE}/qgen/nunchaku.safetensors"), about=about)
    (loaded,) = load("nunchaku.safetensors")
    seen["nunchaku"] = graphs.cosine(draw(loaded), draw(made))
    seen["nunchaku is close"] = graphs.cosine(draw(loaded), want)
    return seen


def lowvram():
    """Weights that ComfyUI leaves where they wait, a part of a model at a time, with LoRAs: the same numbers."""
    plain = model()
    (made,) = quantize(plain, "rtn-w4a16")
    worn = with_lora(made, (graphs.lora(STATE, "attn.qkv" if FLUX else "attn1.to_q", size=4.0), 1.0))
    whole, base = draw(worn), draw(made)
    device = made.load_device
    x, t = torch.randn(1, 16 if FLUX else 4, 8, 8), torch.tensor([0.5])
    told = {"c_crossattn": TEXT[0][0], "transformer_options": {}}
    told |= {"y": TEXT[0][1]["pooled_output"]} if FLUX else {}

    def called(patcher, most):
        """One call with at most so many bytes where the device is, and how many layers were left out."""
        patcher.patch_model(device, lowvram_model_memory=most)
        try:
            with torch.no_grad():
                y = patcher.model.apply_model(x, t, **told)
            return y, patcher.model.lowvram_patch_counter, patcher.model.model_lowvram
        finally:
            patcher.unpatch_model(patcher.offload_device)

    full, _, _ = called(worn, 0)
    low, left, marked = called(worn, 64 << 10)
    seen = {"lowvram": marked, "left": left, "equal": torch.equal(full, low)}
    seen["lora did something"] = not torch.equal(full, called(made, 0)[0])
    seen["whole again"] = torch.equal(draw(worn), whole)
    comfy.model_management.load_models_gpu([worn])
    freed = worn.partially_unload(worn.offload_device, 1 << 40)
    seen["freed"] = freed
    seen["after unloading"] = torch.equal(draw(worn), whole)
    seen["base is back"] = torch.equal(draw(made), base)
    return seen


def timed():
    """Scales that follow the noise level: quantized, saved, loaded, with a LoRA, and told by the sampler's sigmas alone."""
    plain = model()
    want = draw(plain, 4)
    (made,) = quantize(plain, "temporal-int4", **(CALIBRATED | {"steps": 4}))
    got = draw(made, 4)
    module = made.model.diffusion_model
    layers = [layer for layer in module.modules() if getattr(layer, "timed", False)]
    moving = [layer for layer in layers if layer.t_edges is not None]  # the others have one centre for all timesteps
    seen = {"cosine": graphs.cosine(got, want), "layers": len(layers), "moving": len(moving)}
    seen["wound"] = all(layer.clock is module.qgen_clock for layer in moving)

    times = []
    hook = moving[0].register_forward_pre_hook(lambda layer, args: times.append(float(layer.clock.t[0])))
    draw(made, 4)
    sampling = made.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 4)[:-1]
    seen["clock follows sigmas"] = bool(torch.allclose(torch.tensor(times), sampling.timestep(sigmas).float()))
    bins = torch.bucketize(torch.tensor(times), moving[0].t_edges).tolist()
    seen["bins"] = len(set(bins))
    times.clear()
    with torch.no_grad():  # somebody put another number in the place of the timestep: the noise level is what it is
        told = {"sigmas": sigmas[2:3], "cond_or_uncond": [0]}
        context, y = torch.randn(1, 8, 1024), torch.randn(1, 768)
        x = torch.randn(1, 16, 8, 8)
        module(x, torch.zeros(1), context=context, y=y, guidance=None, transformer_options=told)
    seen["sigmas win"] = abs(times[-1] - float(sampling.timestep(sigmas[2:3]))) < 1e-6
    hook.remove()

    file = save(made, "timed").values[0]
    (loaded,) = load(file)
    seen["loaded is equal"] = torch.equal(draw(loaded, 4), got)
    seen["loaded is timed"] = sum(getattr(layer, "timed", False) for layer in loaded.model.diffusion_model.modules())
    lora_of = graphs.lora(STATE, "attn.qkv", size=4.0)
    moved, wanted = draw(with_lora(made, (lora_of, 1.0)), 4) - got, draw(with_lora(plain, (lora_of, 1.0)), 4) - want
    seen["lora"] = graphs.cosine(moved, wanted)
    worn = save(with_lora(made, (lora_of, 1.0)), "worn").values[0]
    seen["worn"] = graphs.cosine(draw(load(worn)[0], 4), moved + got)
    seen["back is exact"] = torch.equal(draw(made, 4), got)
    name = "double_blocks.0.img_mlp.0"
    weight = STATE[f"{name}.weight"]
    change = {f"diffusion_model.{name}.diff": 0.7 * torch.randn(weight.shape) * weight.std()}
    seen["difference"] = graphs.cosine(
        draw(with_lora(made, (change, 1.0)), 4), draw(with_lora(plain, (change, 1.0)), 4)
    )
    layer = made.model.get_submodule(f"diffusion_model.{name}")
    x = torch.randn(2, layer.k)
    y = layer(x)
    layer.set_weight(layer.dequantize(torch.float32) + 1.0)
    seen["override"] = graphs.cosine(layer(x) - y, x.sum(1, keepdim=True).expand_as(y))
    layer.weight = layer.weight
    try:
        save(made, "timed-int8", "ComfyUI: int8")
    except ValueError as error:
        seen["refused"] = str(error)
    return seen


def vae():
    """Decoders with packed layers, in every way that the node offers."""
    from comfy.taesd.taesd import TAESD

    from qgen.nodes.vae import PARTS, WEIGHTS, quantize_vae

    torch.manual_seed(0)
    parts = {name: t for name, t in TAESD(latent_channels=4).state_dict().items() if t.ndim}
    state = {name: torch.randn(t.shape) / max(1, t[0].numel()) ** 0.5 for name, t in parts.items()}
    plain = comfy.sd.VAE(sd=dict(state))
    latent, picture = torch.randn(1, 4, 8, 8), torch.rand(1, 64, 64, 3)
    seen = {"decoded": {}, "encoded": {}}
    torch.set_grad_enabled(False)
    want = plain.decode(latent)
    for weights in WEIGHTS:
        for activations in (False, True):
            for part in PARTS:
                (made,) = quantize_vae(plain, weights, activations, part)
                name = f"{weights} {activations} {part}"
                seen["decoded"][name] = float((made.decode(latent) - want).square().mean().sqrt())
                seen["encoded"][name] = torch.equal(made.encode(picture), plain.encode(picture))
    seen["input unchanged"] = torch.equal(plain.decode(latent), want)
    name = next(n for n in state if n.endswith("conv.0.weight"))
    state[name] = state[name].clone().fill_(float("nan"))
    try:
        quantize_vae(comfy.sd.VAE(sd=dict(state)))
        seen["nan"] = "none"
    except Exception as error:
        seen["nan"] = f"{type(error).__name__}: {error}"
    return seen


SCENARIOS = (base, budget, files, lora, lowvram, rest, timed, vae)
seen = {f.__name__: f for f in SCENARIOS}[SCENARIO.partition("-")[2]]()
print("SEEN " + json.dumps({**seen, "outside": OUTSIDE}))
