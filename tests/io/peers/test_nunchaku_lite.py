"""diffusers' nunchaku_lite: what qgen writes, diffusers itself loads, its kernels replaced by torch; qgen reads it back, bit for bit."""

import importlib
import json
import sys
import types

import pytest
import torch

import qgen
from qgen.calibration.base import Call, Moment
from qgen.errors import BadCheckpoint
from qgen.io.peers import exporters, importers
from qgen.io.peers.base import Layer, Model, Plain
from qgen.io.peers.source import open_source
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.nn.packed import Packed
from qgen.recipe import Recipe, Rule, Spec
from tests.io.peers import nunchaku_writer as writer
from tests.io.peers.test_nunchaku import flux, inputs, relative

diffusers = pytest.importorskip("diffusers", reason="nunchaku_lite is a format of diffusers")

VECTOR = Rule("*", Spec("int4_g64", None), role="vector")
OUTSIDE = Rule("*", None, role="outside")


SVDQUANT = (Smooth(), LowRank(32, rounds=1))


def recipe(weight, act, *rules, methods=SVDQUANT):
    return Recipe(Spec(weight, act, methods), (VECTOR, OUTSIDE, *rules))


def call_of(dtype):
    return {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in inputs().items()}


def quantized(made, dtype=torch.float32):
    """The tiny Flux, quantized for real."""
    model = flux().to(dtype)
    return qgen.quantize(model, made, calibration=[Call((), call_of(dtype), Moment(0.4))], progress=False)


def parts_of(model):
    """Every packed layer and every other tensor of a model, as checkpoints of qgen give them."""
    packed = {path: module for path, module in model.named_modules() if isinstance(module, Packed)}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in packed:
            yield Plain(name, tensor)
    for path, module in packed.items():
        yield Layer(path, module._weight_shape(), module.layout, module.canonical(), module.compute_dtype)


def about(model):
    return Model(type(model).__name__, dict(model.config))


@pytest.fixture
def stubbed(monkeypatch):
    """diffusers' own modules with the kernels package replaced by torch code on the CPU; returns its utils."""
    flux()  # so that nothing else is imported while the package is replaced
    quantizer = importlib.import_module("diffusers.quantizers.nunchaku.nunchaku_quantizer").NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)  # it wants CUDA
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: types.SimpleNamespace(ops=Ops())
    with monkeypatch.context() as during:
        during.setitem(sys.modules, "kernels", kernels)
        import_utils = importlib.import_module("diffusers.utils.import_utils")
        during.setattr(import_utils, "_kernels_available", True)
        during.setattr(import_utils, "_kernels_version", "0.13.0")
        during.setattr(importlib.import_module("diffusers.utils.constants"), "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
        utils = importlib.import_module(name)
    yield utils
    sys.modules.pop(name, None)


class Ops:
    """The kernels' meaning, from their tensors alone, by the tests' own idea of the byte order."""

    def quantize_w4a4_act_fuse_lora(self, x, out, scales, down, low, smooth, fuse_glu, fp4):
        self.x, self.smooth, self.down = x, smooth, down

    def gemm_w4a4(self, *given):
        wgt, out, wscales, up, bias, unsigned, fp4 = (given[i] for i in (1, 2, 5, 9, 15, 19, 22))
        tensors = {"qweight": wgt, "wscales": wscales, "bias": torch.zeros(len(wgt)) if bias is None else bias}
        tensors |= {"smooth_factor": self.smooth, "proj_down": self.down, "proj_up": up}
        if fp4:
            tensors |= {"wtscale": given[23], "wcscales": given[24]}
        assert not unsigned and given[20] == [1.0] * (up.shape[1] // 16)
        out.copy_(writer.Formula(writer.from_file(tensors))(self.x.float()))

    def awq_gemm_w4a16_g64_int32(self, x, qweight, wscales, wzeros):
        layer = writer.from_file({"qweight": qweight, "wscales": wscales, "wzeros": wzeros, "bias": None})
        return (x.float() @ writer.weight_of(layer).T).to(x.dtype)

    def gemv_awq(self, x, qweight, wscales, wzeros, m, n, k, group):
        assert (m, k, group) == (*x.shape, 64) and n == 4 * len(qweight)
        return self.awq_gemm_w4a16_g64_int32(x, qweight, wscales, wzeros)


def strictly(utils, folder, kind):
    """diffusers' config class and strict key check, then every shape and dtype."""
    config = json.loads((folder / "config.json").read_text())
    told = dict(config["quantization_config"])
    assert told.pop("quant_method") == "nunchaku_lite"
    from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig

    checked = NunchakuLiteQuantizationConfig(**told)
    assert {**checked.to_dict(), "quant_method": "nunchaku_lite"} == {
        "svdq_w4a4": None, "awq_w4a16": None, "pre_quantized": True, **config["quantization_config"]
    }  # fmt: skip
    model = getattr(diffusers, kind).from_config(config).to(checked.compute_dtype)
    utils.replace_with_nunchaku_linear(model, checked.to_dict(), checked.compute_dtype)
    source = open_source(folder)
    state = {name: source.read(name) for name in source.shapes}
    utils.check_strict_state_dict_match(model, state)
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = model.state_dict().keys() | {name for name, _ in model.named_parameters()}
    for name, tensor in state.items():
        assert tensor.shape == wanted[name].shape, name
        if name in saved:
            assert tensor.dtype == wanted[name].dtype, name
    return config, state


KINDS = {
    "int4": ("int4_g64", "int4_g64"),
    "nvfp4": ("nvfp4", "nvfp4_dynamic"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_flux_passes_diffusers_strict_check_and_runs_there(kind, stubbed, tmp_path):
    model = quantized(recipe(*KINDS[kind]))
    lines = exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    assert all("rounded to bfloat16" in line for line in lines)
    config, _ = strictly(stubbed, tmp_path / "out", "FluxTransformer2DModel")
    section = config["quantization_config"]["svdq_w4a4"]
    assert (section["precision"], section["group_size"], section["rank"]) == (kind, 64 if kind == "int4" else 16, 32)
    assert len(section["targets"]) == 2 * 12 + 2 * 5
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    for path in (*section["targets"], *config["quantization_config"]["awq_w4a16"]["targets"]):
        layer = theirs.get_submodule(path)
        assert type(layer).__name__ == ("SVDQW4A4Linear" if path in section["targets"] else "AWQW4A16Linear")
        x = torch.randn(20, layer.in_features).bfloat16()
        assert relative(layer(x).float(), model.get_submodule(path)(x.float())) < 3e-2, path  # smoothing in bfloat16
    with torch.no_grad():
        assert relative(theirs(**call_of(torch.bfloat16))[0].float(), model(**inputs())[0]) < 2e-2


def test_pixart_of_the_demo_passes_the_strict_check(make_demo_pipe, stubbed, tmp_path):
    """Its position table is a buffer that no state dict holds, and that the check wants."""
    pipe = make_demo_pipe()
    qgen.quantize(pipe, "rtn-int4", progress=False)
    model = pipe.transformer
    lines = exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    config, state = strictly(stubbed, tmp_path / "out", "PixArtTransformer2DModel")
    assert "pos_embed.pos_embed" in state
    sections = config["quantization_config"].values()
    kept = sum(len(section["targets"]) for section in sections if isinstance(section, dict))
    assert kept >= 5 * 10
    assert kept + sum("dequantized" in line for line in lines) == sum(isinstance(m, Packed) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_reads_back_bit_for_bit(kind, tmp_path):
    """A bfloat16 model: codes, scales, smoothing, low rank, biases. One float32 tensor scale becomes two bfloat16 factors."""
    model = quantized(recipe(*KINDS[kind]), torch.bfloat16)
    for layer in model.modules():  # as a model that was bfloat16 before it was quantized
        if isinstance(layer, Packed):
            slots = layer.canonical()
            layer.fill(
                {name: t.bfloat16() if name in ("smooth", "down", "up", "bias") else t for name, t in slots.items()}
            )
    exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    source = open_source(tmp_path / "out")
    assert importers["nunchaku-lite"].recognizes(source) and not importers["nunchaku"].recognizes(source)
    before = {p.path if isinstance(p, Layer) else p.name: p for p in parts_of(model)}
    after = {p.path if isinstance(p, Layer) else p.name: p for p in importers["nunchaku-lite"].parts(source)}
    assert before.keys() == after.keys()
    for name, part in before.items():
        if isinstance(part, Plain):
            assert torch.equal(after[name].tensor, part.tensor), name
            continue
        got, want = after[name].slots, dict(part.slots)
        if part.layout.act == "":  # signed codes became unsigned ones and a zero
            zero = got.pop("zero")
            assert after[name].layout.weight == "uint4_g64" and torch.equal(zero, want["scales"] * -8)
            got["codes"] = got["codes"] ^ 0x88
        if kind == "nvfp4" and "global_scale" in want:
            torch.testing.assert_close(got.pop("global_scale"), want.pop("global_scale"), rtol=2**-12, atol=0)
        assert got.keys() == want.keys(), name
        for slot in want:
            assert got[slot].dtype == want[slot].dtype and torch.equal(
                got[slot].flatten().view(torch.uint8), want[slot].flatten().view(torch.uint8)
            ), slot


def test_ranks_that_differ_are_levelled(stubbed, tmp_path):
    low = Rule("*.ff.*", Spec("int4_g64", "int4_g64", (LowRank(10, rounds=0),)))
    none = Rule("*.to_out.*", Spec("int4_g64", "int4_g64"))
    model = quantized(recipe("int4_g64", "int4_g64", low, none), torch.bfloat16)
    exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    config, state = strictly(stubbed, tmp_path / "out", "FluxTransformer2DModel")
    assert config["quantization_config"]["svdq_w4a4"]["rank"] == 32
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    up = writer.up_from_file(state["transformer_blocks.0.ff.net.2.proj_up"])
    assert up[:, :10].any() and not up[:, 10:].any()
    assert not state["transformer_blocks.0.attn.to_out.0.proj_up"].any()


def test_layers_that_do_not_fit_are_dequantized_with_a_line_each(stubbed, tmp_path):
    rules = (
        Rule("*.ff.net.2", Spec("int4_g64", "uint4p_g64", methods=(qgen.recipe.methods["shift"](),))),
        Rule("*.ff.net.0.proj", Spec("int4_s8_g64", "int8_row")),
        Rule("*.attn.to_q", Spec("int4_g64", None, (LowRank(16, rounds=0),))),
        Rule("*.proj_mlp", Spec("nvfp4", "nvfp4_dynamic")),
    )
    model = quantized(recipe("int4_g64", "int4_g64", *rules, methods=()))
    lines = exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    _, state = strictly(stubbed, tmp_path / "out", "FluxTransformer2DModel")
    said = {line.partition(":")[0]: line for line in lines if "dequantized" in line}
    assert "shifted inputs" in said["transformer_blocks.1.ff.net.2"]
    assert "int4_s8_g64 x int8_row" in said["transformer_blocks.0.ff.net.0.proj"]
    assert "float with down" in said["single_transformer_blocks.0.attn.to_q"]
    assert "one precision" in said["single_transformer_blocks.1.proj_mlp"]
    assert len(said) == 2 + 2 + 4 + 2
    layer, shifted = (model.get_submodule(f"transformer_blocks.0.ff.net.{name}") for name in ("0.proj", "2"))
    torch.testing.assert_close(state["transformer_blocks.0.ff.net.0.proj.weight"], layer.dequantize(torch.bfloat16))
    bias = flux().get_submodule("transformer_blocks.0.ff.net.2").bias
    torch.testing.assert_close(state["transformer_blocks.0.ff.net.2.bias"].float(), bias, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(shifted.bias, bias, atol=1e-3)


def test_a_model_of_which_nothing_can_be_kept_is_refused(tmp_path):
    model = quantized(recipe("int4_g64", "uint4_g64", methods=()))
    with pytest.raises(ValueError, match=r"34 layers are int4_g64 x uint4_g64.*nunchaku-int4"):
        exporters["nunchaku-lite"].write(parts_of(model), tmp_path / "out", about=about(model))
    assert not list(tmp_path.iterdir())


def test_wrong_models_are_refused(tmp_path):
    model = quantized(recipe("int4_g64", "int4_g64", methods=()))
    write = exporters["nunchaku-lite"].write
    with pytest.raises(ValueError, match="want the config of a model of diffusers, found none"):
        write(parts_of(model), tmp_path / "out", about=Model())
    with pytest.raises(ValueError, match="found NoSuchModel"):
        write(parts_of(model), tmp_path / "out", about=Model("NoSuchModel", {"a": 1}))
    other = Model("FluxTransformer2DModel", {**model.config, "num_layers": 3})
    with pytest.raises(ValueError, match=r"wants 'transformer_blocks.2.\S+', which the parts lack"):
        write(parts_of(model), tmp_path / "out", about=other)
    other = Model("FluxTransformer2DModel", {**model.config, "in_channels": 8})
    with pytest.raises(ValueError, match="is not the model's"):
        write(parts_of(model), tmp_path / "out", about=other)
    assert not list(tmp_path.iterdir())


def lite(n=128, k=128, kind="int4"):
    """A file of one layer, and its config."""
    tensors = writer.to_file(writer.random_svdq(n, k, kind), "block.fc", old=False) | {"norm.weight": torch.ones(k)}
    section = {"precision": kind, "group_size": 64 if kind == "int4" else 16, "rank": 16, "targets": ["block.fc"]}
    return tensors, {
        "quantization_config": {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", "svdq_w4a4": section}
    }


def test_one_layer_is_read(dict_source):
    tensors, config = lite()
    parts = list(importers["nunchaku-lite"].parts(dict_source(tensors, config=config)))
    assert [type(part).__name__ for part in parts] == ["Layer", "Plain"]
    assert parts[0].layout.weight == parts[0].layout.act == "int4_g64" and parts[0].shape == (128, 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ["block.fc", "block.gone"]}, "'block.gone.qweight' is not there"),
        ({"targets": []}, "'block.fc.qweight' is no target"),
        ({"targets": "block.fc"}, "wants precision, group_size and targets"),
        ({"targets": ["block.fc", "block.fc"]}, "wants precision"),
        ({"targets": [3]}, "wants precision"),
        ({"group_size": 16}, "wants precision"),
        ({"precision": "int3"}, "wants precision"),
        ({"precision": ["int4"]}, "wants precision"),
        ({"precision": "nvfp4", "group_size": 16}, "'block.fc.wscales' is bfloat16"),
    ],
)
def test_configs_that_do_not_fit_are_refused(dict_source, change, said):
    tensors, config = lite()
    config["quantization_config"]["svdq_w4a4"].update(change)
    with pytest.raises(BadCheckpoint, match=said):
        list(importers["nunchaku-lite"].parts(dict_source(tensors, config=config)))
