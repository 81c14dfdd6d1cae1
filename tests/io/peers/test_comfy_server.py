"""A small Flux in each native format, loaded and sampled by the real ComfyUI server with its stock nodes, against the 16-bit model there.

Weights differ in size from block to block, so that scales in a wrong order show; one test makes sure that they would.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qgen.io.peers import exporters, importers
from qgen.io.peers.base import Layer, Model, Plain
from qgen.io.peers.comfy_formats import FORMATS
from qgen.io.peers.floats import dequantized
from qgen.io.peers.source import open_source
from tests import comfy_server

WHERE = comfy_server.found()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(isinstance(WHERE, str), reason=WHERE if isinstance(WHERE, str) else ""),
]
STOCK = [name for name, native in FORMATS.items() if native.stock]
FLOAT_INPUTS = ("fp8", "fp8_e5m2", "nvfp4", "mxfp8")  # whose activations stay float where there is no GPU
FLOOR = 0.995


def flux(hidden=256):
    """A random Flux whose weights have their own size in every row and every block of 16 columns."""
    generator, state = torch.Generator().manual_seed(0), {}

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    for name, shape in comfy_server.flux_shapes(hidden).items():
        if name.endswith(".scale"):
            state[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            state[name] = 0.02 * draw(*shape)
        else:
            n, k = shape
            sizes = torch.exp(0.5 * draw(n, 1)) * torch.exp(0.7 * draw(n, k // 16)).repeat_interleave(16, 1)
            state[name] = draw(n, k) * sizes / sizes.square().mean().sqrt() / k**0.5
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def inside(name, shape):
    return "blocks." in name


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    with comfy_server.Server(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture(scope="module")
def state():
    return flux()


@pytest.fixture(scope="module")
def sample(comfy):
    """A function: name of a file in the server's folder → the latent that ComfyUI samples with it, float32."""

    def run(name):
        outputs = comfy.run(comfy_server.flux_graph(f"{name}.safetensors", name))
        (latent,) = outputs["5"]["latents"]
        return load_file(comfy.base / "output" / latent["subfolder"] / latent["filename"])["latent_tensor"].float()

    return run


@pytest.fixture(scope="module")
def truth(comfy, state, sample):
    save_file(state, comfy.models / "truth.safetensors")
    return sample("truth")


@pytest.fixture(scope="module")
def export(comfy, state):
    """A function: writes the model with its blocks in a format under a name, and returns the layers in it."""

    def write(name, format):
        parts = (Plain(key, tensor) for key, tensor in state.items())
        target = comfy.models / f"{name}.safetensors"
        said = exporters["comfy"].write(parts, target, about=Model(), format=format, eligible=inside)
        assert said == []
        layers = [part for part in importers["comfy"].parts(open_source(target)) if isinstance(part, Layer)]
        assert len(layers) == 13  # every linear layer of the two blocks
        return layers

    return write


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", STOCK)
def test_stock_comfyui_samples_it(name, export, sample, truth, comfy, state):
    """The latent agrees with the 16-bit model's; where inputs stay float, it is that of the dequantized weights."""
    layers = export(name, name)
    found = sample(name)
    print(f"{name}: cosine {cosine(found, truth):.5f}, relative RMS {distance(found, truth):.4f}")
    assert cosine(found, truth) >= FLOOR and 0.8 < float(found.norm() / truth.norm()) < 1.25
    if name in FLOAT_INPUTS:
        twin = {**state, **{f"{layer.path}.weight": dequantized(layer)[0] for layer in layers}}
        save_file(twin, comfy.models / f"{name}-twin.safetensors")
        twin = sample(f"{name}-twin")
        print(f"{name}: relative RMS {distance(found, twin):.5f} from its dequantized weights")
        assert distance(found, twin) < 0.25 * distance(found, truth)


def test_a_wrong_order_of_scales_would_show(export, sample, truth, comfy):
    export("right", "nvfp4")
    wrong = load_file(comfy.models / "right.safetensors")
    for name, tensor in wrong.items():
        if name.endswith("weight_scale"):
            wrong[name] = tensor.view(torch.uint8).flatten().roll(1).view(tensor.dtype).view(tensor.shape)
    save_file(wrong, comfy.models / "wrong.safetensors")
    assert cosine(sample("wrong"), truth) < FLOOR


def test_smoothing_is_read(export, sample, truth, comfy, state):
    """Inputs divided by powers of two, weights multiplied by them: the same model, if ComfyUI reads `pre_quant_scale` as we write it."""
    generator, parts = torch.Generator().manual_seed(3), []
    for name, tensor in state.items():
        if not name.endswith("weight") or not inside(name, tensor.shape):
            parts.append(Plain(name, tensor))
            continue
        smooth = 2.0 ** torch.randint(-3, 4, (tensor.shape[1] // 16,), generator=generator).repeat_interleave(16)
        layer = FORMATS["nvfp4"].quantize(name.removesuffix(".weight"), tensor.float() * smooth, torch.bfloat16)
        parts.append(with_smooth(layer, smooth))
    said = exporters["comfy"].write(parts, comfy.models / "smooth.safetensors", about=Model())
    assert said == [] and cosine(sample("smooth"), truth) >= FLOOR


def with_smooth(layer, smooth):
    from dataclasses import replace

    slots = {**layer.slots, "smooth": smooth}
    layout = replace(layer.layout, slots=tuple(slot for slot in slots if slot not in ("codes", "scales")))
    return replace(layer, slots=slots, layout=layout)


def test_requantized_layers_load(comfy, state, sample, truth):
    """Layers of qgen's own int8 go to mxfp8, one line each, and ComfyUI samples the file."""
    parts = [Plain(name, tensor) for name, tensor in state.items() if not inside(name, ()) or name[-6:] != "weight"]
    for name, tensor in state.items():
        if inside(name, ()) and name[-6:] == "weight":
            parts.append(FORMATS["int8"].quantize(name.removesuffix(".weight"), tensor.float(), torch.bfloat16))
    said = exporters["comfy"].write(parts, comfy.models / "again.safetensors", about=Model(), format="mxfp8")
    assert len(said) == 13 and all(line.startswith("requantized to mxfp8: ") for line in said)
    assert cosine(sample("again"), truth) >= FLOOR


@pytest.mark.parametrize("recipe, format", [("rtn-nvfp4", None), ("fp8", "fp8"), ("rtn-int4", "convrot_w4a4")])
def test_a_quantized_diffusers_model_exports(recipe, format, comfy, sample):
    """Names are turned to the original layout and q, k, v fused: diffusers' Flux, quantized by qgen, runs in ComfyUI."""
    diffusers = pytest.importorskip("diffusers", reason="the model is diffusers'")
    import qgen.io.convert as io
    from qgen.io.keys.outward import original

    model = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=1024,
        pooled_projection_dim=768,
    ).bfloat16()
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
    floats = (Plain(name, tensor) for name, tensor in model.state_dict().items())
    tensors = {part.name: part.tensor.contiguous() for part in original(floats, type(model).__name__)}
    save_file(tensors, comfy.models / f"{recipe}-float.safetensors")
    folder = comfy.base / recipe
    model.save_pretrained(folder)
    options = {} if format is None else {"format": format}
    said = io.convert(folder, recipe, comfy.models / f"{recipe}.safetensors", "comfy", **options)
    assert not any(line.startswith("dequantized") for line in said)
    found, truth = sample(recipe), sample(f"{recipe}-float")
    print(f"{recipe}: cosine {cosine(found, truth):.5f}, relative RMS {distance(found, truth):.4f}")
    assert cosine(found, truth) >= FLOOR and distance(found, truth) > 1e-3  # the blocks do matter
