"""Nunchaku's single file, written: what came from such a file goes back to it, and a model quantized for it keeps its weights."""

import json

import pytest
import torch

import qgen
from qgen.io.peers import exporters, importers
from qgen.io.peers.base import Layer, Model
from qgen.io.peers.floats import dequantized
from qgen.io.peers.nunchaku_write import scale_pair
from qgen.io.peers.source import open_source
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.recipe import Rule, Spec
from tests.io.peers import nunchaku_writer as writer
from tests.io.peers.test_nunchaku import CONFIG, PADDED, make
from tests.io.peers.test_nunchaku_lite import about, parts_of, quantized, recipe

diffusers = pytest.importorskip("diffusers", reason="the exporter asks diffusers for the model's tensors")


def tails(tensors, stem):
    """One layer's tensors under today's names."""
    new = {
        "lora_down": "proj_down",
        "lora_up": "proj_up",
        "smooth": "smooth_factor",
        "smooth_orig": "smooth_factor_orig",
    }
    found = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == stem}
    return {new.get(tail, tail): t for tail, t in found.items()}


def told(metadata):
    return Model("FluxTransformer2DModel", json.loads(metadata["config"]))


@pytest.mark.parametrize(
    ("kind", "config"), [("int4", CONFIG), ("nvfp4", CONFIG), ("int4", PADDED)], ids=["int4", "nvfp4", "padded"]
)
def test_a_file_of_theirs_comes_back(dict_source, tmp_path, kind, config):
    """Every key, shape and dtype; codes, scales, smoothing bit for bit. Biases went through a rounding, ranks were levelled."""
    tensors, metadata, _ = make(kind, config=config)
    tensors = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    parts = importers["nunchaku"].parts(dict_source(tensors, metadata))
    lines = exporters["nunchaku"].write(parts, tmp_path / "out.safetensors", about=told(metadata))
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    source = open_source(tmp_path / "out.safetensors")
    got = {name: source.read(name) for name in source.shapes}
    assert got.keys() == tensors.keys()
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in tensors.items()}
    assert json.loads(source.metadata["config"])["num_layers"] == config["num_layers"]
    assert source.metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    said = json.loads(source.metadata["quantization_config"])
    assert (said["method"], said["rank"]) == ("svdquant", 32)
    assert said["weight"]["dtype"] == ("int4" if kind == "int4" else "fp4_e2m1_all")
    rerounded = [line for line in lines if "activations" in line]
    assert len(rerounded) == (config["num_single_layers"] if kind == "int4" else 0)
    for stem in sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}):
        before, after = (writer.from_file(tails(t, stem)) for t in (tensors, got))
        assert torch.equal(before["codes"], after["codes"]), stem
        assert torch.equal(before["scales"].float(), after["scales"].float()), stem
        if before["kind"] == "awq":
            assert torch.equal(before["zeros"], after["zeros"]), stem
        else:
            assert torch.equal(before["smooth"], after["smooth"]), stem
            low = [(layer["up"].float() @ layer["down"].float()) for layer in (before, after)]
            torch.testing.assert_close(*low, rtol=1e-5, atol=1e-6)
            if kind == "nvfp4":
                assert torch.equal(
                    *(layer["wcscales"].float() * layer["wtscale"].float() for layer in (before, after))
                ), stem
        if not stem.startswith("single") or before["kind"] == "awq":  # there two biases became one
            torch.testing.assert_close(after["bias"].float(), before["bias"].float(), rtol=2**-7, atol=2**-8)
    for i in range(config["num_single_layers"]):
        biases = [
            sum(undone(t, f"single_transformer_blocks.{i}.{name}", kind) for name in ("out_proj", "mlp_fc2"))
            for t in (tensors, got)
        ]
        torch.testing.assert_close(*biases, rtol=2**-6, atol=2**-6)
    for name, t in tensors.items():
        if name.rpartition(".")[0] + ".qweight" not in tensors:
            assert torch.equal(got[name], t), name


def undone(tensors, stem, kind):
    """A file's bias without what it takes away for a shifted input."""
    layer = writer.from_file(tails(tensors, stem))
    shifted = kind == "int4" and stem.endswith("fc2")
    return layer["bias"].float() + (
        0.171875 * (writer.weight_of(layer) / layer["smooth"].float()).sum(1) if shifted else 0
    )


FUSED = (Smooth(), LowRank(32, rounds=1))
FLUX_RULES = (Rule("time_text_embed*", None), Rule("norm_out*", None))


def for_nunchaku(weight, act, gelu=""):
    """The recipe that Nunchaku's runner of Flux wants."""
    made = recipe(weight, act, *FLUX_RULES)
    made = qgen.Recipe(Spec(weight, act, FUSED, share=True), made.rules)
    if gelu:
        spec = Spec(weight, gelu, (*FUSED, qgen.recipe.methods["shift"]()), share=True)
        made = qgen.Recipe(made.default, (*made.rules, Rule("*.ff*.net.2", spec)))
    return made


@pytest.mark.parametrize(
    ("weight", "act", "gelu"),
    [("int4_g64", "int4_g64", ""), ("int4_g64", "int4_g64", "uint4p_g64"), ("nvfp4", "nvfp4_dynamic", "")],
    ids=["int4", "int4-shifted", "nvfp4"],
)
def test_a_quantized_flux_keeps_its_weights(tmp_path, weight, act, gelu):
    """Written, read again, dequantized: the same float layers, to bfloat16."""
    model = quantized(for_nunchaku(weight, act, gelu), torch.bfloat16)
    exporters["nunchaku"].write(parts_of(model), tmp_path / "out.safetensors", about=about(model))
    source = open_source(tmp_path / "out.safetensors")
    assert importers["nunchaku"].recognizes(source)
    before = {p.path: p for p in parts_of(model) if isinstance(p, Layer)}
    after = {p.path: p for p in importers["nunchaku"].parts(source) if isinstance(p, Layer)}
    assert before.keys() == after.keys()
    for path, part in before.items():
        want, got = dequantized(part), dequantized(after[path])
        torch.testing.assert_close(got[0], want[0], rtol=2**-6, atol=2**-7 * float(want[0].abs().max()))
        torch.testing.assert_close(got[1].float(), want[1].float(), rtol=2**-6, atol=2**-6)
    fc2 = after["transformer_blocks.1.ff.net.2"]
    assert fc2.layout.act == ("uint4p_g64" if weight == "int4_g64" else "nvfp4_dynamic")


def fails(model, tmp_path, match, parts=None):
    with pytest.raises(ValueError, match=match):
        exporters["nunchaku"].write(parts or parts_of(model), tmp_path / "out.safetensors", about=about(model))
    assert not list(tmp_path.iterdir())


def test_layers_that_are_fused_must_share(tmp_path):
    model = quantized(recipe("int4_g64", "int4_g64", *FLUX_RULES, methods=FUSED))
    fails(model, tmp_path, r"attn.to_\w: Nunchaku fuses it with others .*share=True")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (
            (Rule("*.to_out.*", Spec("int4_g64", "uint4_g64")),),
            "to_out.0: Nunchaku's kernels cannot compute int4_g64 x uint4_g64",
        ),
        ((Rule("*.to_out.*", None),), "to_out.0 is not quantized, and NunchakuFluxTransformer2dModel has"),
        (
            (Rule("*.to_out.*", Spec("nvfp4", "nvfp4_dynamic")),),
            "beside layers of int4: a file has one precision|beside layers of nvfp4",
        ),
        ((Rule("*norm1.linear", Spec("int8_row")),), "norm1.linear: Nunchaku wants it in W4A16"),
    ],
)
def test_what_the_runner_lacks_is_refused(tmp_path, rules, said):
    made = for_nunchaku("int4_g64", "int4_g64")
    fails(quantized(qgen.Recipe(made.default, (*made.rules, *rules))), tmp_path, said)


def test_missing_parts_and_wrong_models(tmp_path):
    model = quantized(for_nunchaku("int4_g64", "int4_g64"))
    some = [p for p in parts_of(model) if not (isinstance(p, Layer) and p.path.endswith("0.attn.to_k"))]
    fails(model, tmp_path, "wants 'single_transformer_blocks.0.attn.to_k.bias', which the parts lack", some)
    write = exporters["nunchaku"].write
    with pytest.raises(ValueError, match="found PixArtTransformer2DModel"):
        write(parts_of(model), tmp_path / "out.safetensors", about=Model("PixArtTransformer2DModel", {"a": 1}))
    with pytest.raises(ValueError, match=r"one \.safetensors file"):
        write(parts_of(model), tmp_path / "folder", about=about(model))
    assert not list(tmp_path.iterdir())


def test_layers_the_runner_keeps_in_16_bits(tmp_path):
    made = for_nunchaku("int4_g64", "int4_g64")
    rule = Rule("norm_out.linear", Spec("int4_g64"))
    model = quantized(qgen.Recipe(made.default, (*made.rules, rule)), torch.bfloat16)
    lines = exporters["nunchaku"].write(parts_of(model), tmp_path / "out.safetensors", about=about(model))
    assert any(line.startswith("norm_out.linear: dequantized") for line in lines)
    source = open_source(tmp_path / "out.safetensors")
    assert torch.equal(source.read("norm_out.linear.weight"), model.norm_out.linear.dequantize(torch.bfloat16))


class TestScalePair:
    def test_one_scale(self):
        for value in (0.01 + torch.rand(50)).tolist():
            scale = torch.full((8, 1), value * 1e-3)
            tensor, channels, error = scale_pair(scale, torch.bfloat16)
            assert tensor.dtype == channels.dtype == torch.bfloat16 and tensor.shape == (1,) and channels.shape == (8,)
            torch.testing.assert_close(
                tensor.double() * channels.double(), scale.flatten().double(), rtol=2**-12, atol=0
            )
            assert error <= 2**-12

    def test_products_come_back_exactly(self):
        for _ in range(20):
            scale = torch.randn(1).exp().bfloat16().float() * (torch.rand(300, 1) + 0.5).bfloat16().float()
            tensor, channels, error = scale_pair(scale, torch.bfloat16)
            assert error == 0 and torch.equal(tensor.float() * channels.float(), scale.flatten())

    def test_any_rows(self):
        scale = torch.rand(200, 1) + 0.1
        tensor, channels, error = scale_pair(scale, torch.bfloat16)
        torch.testing.assert_close(tensor.float() * channels.float(), scale.flatten(), rtol=2**-8, atol=0)
        assert error < 2**-8

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_zeros(self, dtype):
        tensor, channels, error = scale_pair(torch.zeros(4, 1), dtype)
        assert not tensor.any() and not channels.any() and error == 0
