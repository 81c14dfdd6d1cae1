"""Plain 16-bit export: the values layers stand for, a float layer with the same outputs, and files that other libraries load."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qgen import formats
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.floats import dequantized
from qgen.kernels import reference
from qgen.kernels.slots import Slots
from qgen.nn.packed import Layout

N, K = 48, 128


def layer(path="a.b", name="int4_g64", act="", hadamard=0, shape=(N, K), **more):
    weight = torch.randn(shape[0], torch.Size(shape[1:]).numel())
    q = formats.get(name).quantize(
        torch.nn.functional.pad(weight, (0, formats.padded(weight.shape[1], name) - weight.shape[1]))
    )
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero, **more}
    slots = {slot: t for slot, t in slots.items() if t is not None}
    present = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    rank = more["down"].shape[0] if "down" in more else 0
    return Layer(path, shape, Layout(name, act, rank, hadamard, present), slots, torch.bfloat16)


CASES = {
    "plain": {},
    "zeros": {"name": "uint4_g64"},
    "smoothed": {"smooth": torch.rand(K) + 0.5},
    "low rank": {"down": torch.randn(4, K), "up": torch.randn(N, 4), "bias": torch.randn(N)},
    "hadamard": {"hadamard": 64},
    "shifted": {"shift": torch.tensor(0.7), "bias": torch.randn(N)},
    "shifted without bias": {"shift": torch.tensor(0.7)},
    "everything": {
        "name": "nvfp4", "hadamard": 32, "smooth": torch.rand(K) + 0.5, "shift": torch.tensor(-0.3), "down": torch.randn(4, K),
        "up": torch.randn(N, 4), "bias": torch.randn(N),
    },
    "padded": {"shape": (N, 100), "smooth": torch.rand(100) + 0.5, "shift": torch.tensor(0.2)},
}  # fmt: skip


@pytest.mark.parametrize("what", CASES)
def test_outputs_are_those_of_the_quantized_layer(what):
    part = layer(**CASES[what])
    x = torch.randn(5, part.shape[1])
    want = reference.linear(x, Slots.of(part.slots, part.layout.weight, "", N, part.layout.hadamard))
    weight, bias = dequantized(part)
    bias = None if bias is None else bias.float()
    got = torch.nn.functional.linear(x, weight, bias)
    tolerance = (
        2e-5 if what != "shifted without bias" and what != "padded" else 3e-3
    )  # a new bias is stored in bfloat16
    assert (got - want).norm() <= tolerance * want.norm()


def test_a_folder_for_diffusers(tmp_path):
    made = [
        layer(bias=torch.randn(N)),
        layer("conv", "int8_row", shape=(8, 4, 3, 3)),
        Plain("norm.weight", torch.randn(3)),
    ]
    about = Model("X", {"_class_name": "X", "quantization_config": {"quant_method": "qgen"}})
    notes = exporters["float"].write(made, tmp_path / "m", about=about)
    assert notes == ["a.b: dequantized: int4_g64 to bfloat16", "conv: dequantized: int8_row to bfloat16"]
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"_class_name": "X"}
    state = load_file(tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    assert set(state) == {"a.b.weight", "a.b.bias", "conv.weight", "norm.weight"}
    assert state["conv.weight"].shape == (8, 4, 3, 3) and state["norm.weight"].dtype == torch.float32
    for part in made[:2]:
        assert torch.equal(state[f"{part.path}.weight"], dequantized(part)[0].bfloat16())
    assert torch.equal(state["a.b.bias"], made[0].slots["bias"])


def test_names_of_files(tmp_path):
    part = Plain("x", torch.ones(2))
    exporters["float"].write([part], tmp_path / "t", about=Model("L", {"architectures": ["L"]}))
    exporters["float"].write([part], tmp_path / "one.safetensors", about=Model())
    exporters["float"].write([part], tmp_path / "bare", about=Model())
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        "bare/diffusion_pytorch_model.safetensors",
        "one.safetensors",
        "t/config.json",
        "t/model.safetensors",
    ]


def test_diffusers_loads_the_folder(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the reader is diffusers'")
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        pooled_projection_dim=64, axes_dims_rope=[8, 12, 12],
    ).bfloat16()  # fmt: skip
    made = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "blocks" in path:
            q = formats.get("int4_g64").quantize(module.weight.data)
            slots = {"codes": q.codes, "scales": q.scales, "bias": module.bias.data}
            made.append(Layer(path, tuple(module.weight.shape), Layout("int4_g64", slots=("bias",)), slots))
        else:
            made += [Plain(f"{path}.{n}", p.data) for n, p in module.named_parameters(recurse=False)]
    exporters["float"].write(made, tmp_path / "m", about=Model("FluxTransformer2DModel", dict(model.config)))
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "m", torch_dtype=torch.bfloat16).state_dict()
    assert set(loaded) == set(model.state_dict())
    for part in made:
        name, want = (
            (part.name, part.tensor)
            if isinstance(part, Plain)
            else (f"{part.path}.weight", dequantized(part)[0].bfloat16())
        )
        assert torch.equal(loaded[name], want)


def test_nothing_is_left_of_a_failure(tmp_path):
    def broken():
        yield Plain("a", torch.ones(3))
        raise KeyboardInterrupt

    for target in ("m", "one.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            exporters["float"].write(broken(), tmp_path / target, about=Model())
    assert list(tmp_path.iterdir()) == []
