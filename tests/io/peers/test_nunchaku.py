"""Nunchaku's own files: a Flux with two double and two single blocks, written by an independent packer, imported, and run on the CPU."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn

from qgen.errors import BadCheckpoint
from qgen.formats import packing as canonical
from qgen.io.peers import importers
from qgen.io.peers.base import Layer
from qgen.nn import QuantLinear
from tests.io.peers import nunchaku_writer as writer

diffusers = pytest.importorskip("diffusers", reason="the models that files are for are diffusers'")

CONFIG = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 64, "guidance_embeds": False, "axes_dims_rope": (16, 24, 24),
}  # fmt: skip


def flux(**changes):
    torch.manual_seed(3)
    return diffusers.FluxTransformer2DModel(**(CONFIG | changes)).eval()


def inputs(config=CONFIG):
    torch.manual_seed(5)
    return {
        "hidden_states": torch.randn(1, 24, config["in_channels"]),
        "encoder_hidden_states": torch.randn(1, 10, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([0.4]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0)),
        "txt_ids": torch.zeros(10, 3),
        "return_dict": False,
    }


DOUBLE = {  # name in the file: (paths in diffusers, N and K of the whole in units of the hidden size, after GELU)
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), 3, 1, False),
    "qkv_proj_context": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 3, 1, False),
    "out_proj": (("attn.to_out.0",), 1, 1, False),
    "out_proj_context": (("attn.to_add_out",), 1, 1, False),
    "mlp_fc1": (("ff.net.0.proj",), 4, 1, False),
    "mlp_fc2": (("ff.net.2",), 1, 4, True),
    "mlp_context_fc1": (("ff_context.net.0.proj",), 4, 1, False),
    "mlp_context_fc2": (("ff_context.net.2",), 1, 4, True),
}
SINGLE = {
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), 3, 1, False),
    "mlp_fc1": (("proj_mlp",), 4, 1, False),
    "out_proj": (("proj_out",), 1, 1, False),
    "mlp_fc2": (("proj_out",), 1, 4, True),
}
NEW = {  # the second spelling of the same files
    "qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.add_qkv_proj", "out_proj": "attn.to_out.0", "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2", "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2",
}  # fmt: skip
NEW_SINGLE = {"qkv_proj": "attn.to_qkv", "mlp_fc1": "mlp_fc1", "mlp_fc2": "mlp_fc2", "out_proj": "attn.to_out"}


def rows_of(layer, start, stop):
    part = {name: t[start:stop] for name, t in layer.items() if name in ("codes", "scales", "up", "bias", "wcscales")}
    return layer | part


def up128(size):
    return -(-size // 128) * 128


def make(kind="int4", old=True, own_scales=False, config=CONFIG):
    """A file of `kind` and what it means: (tensors, metadata, float model with a Formula in every quantized place).

    own_scales: whether the two halves of a single block's last layer have different tensor scales.
    """
    model = flux(**config)
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    tensors, taken = {}, []
    for block, table, count in (
        ("transformer_blocks", DOUBLE, config["num_layers"]),
        ("single_transformer_blocks", SINGLE, config["num_single_layers"]),
    ):
        for i in range(count):
            halves = []
            for name, (paths, n, k, gelu) in table.items():
                n, k = n * hidden, k * hidden
                rows = torch.tensor([1.0, 0.75, 1.25]).repeat_interleave(n // 3) if len(paths) == 3 else None
                scale = {"out_proj": 2.0**-14, "mlp_fc2": 2.0**-14 * (1.5 if own_scales else 1.0)}.get(name)
                pk = -(-k // (64 if kind == "int4" else 16)) * (64 if kind == "int4" else 16)
                layer = writer.random_svdq(
                    n, pk, kind, 16, gelu, per_row=rows, wtscale=scale if block[0] == "s" else None
                )
                layer |= {"smooth": layer["smooth"][:k], "down": layer["down"][:, :k]}
                if gelu and kind == "int4" and pk != k:
                    raise AssertionError("the tests' inputs after GELU fill their blocks")
                stem = name if old else (NEW if block[0] == "t" else NEW_SINGLE)[name]
                whole = writer.padded(layer, up128(n), up128(k))
                tensors |= writer.to_file(whole, f"{block}.{i}.{stem}", old)
                for j, path in enumerate(paths):
                    part = rows_of(layer, j * n // len(paths), (j + 1) * n // len(paths))
                    if path == "proj_out":
                        halves.append(part)
                    else:
                        put(model, f"{block}.{i}.{path}", writer.Formula(part))
                    taken.append(f"{block}.{i}.{path}")
            if halves:
                rounds = kind == "nvfp4" and not own_scales
                put(model, f"{block}.{i}.proj_out", SideBySide(halves, hidden, rounds))
            for name, turns in {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}.items():
                if (turns == 3) != (block[0] == "s"):
                    continue
                path = f"{block}.{i}.{name}"
                layer = writer.random_awq(turns * hidden, hidden)
                tensors |= writer.to_file(layer, path)
                put(model, path, writer.Formula(in_order(layer, turns)))
                taken.append(path)
    names = {
        "attn.norm_q": "norm_q",
        "attn.norm_k": "norm_k",
        "attn.norm_added_q": "norm_added_q",
        "attn.norm_added_k": "norm_added_k",
    }
    for name, t in flux(**config).state_dict().items():
        if name.rpartition(".")[0] in taken:
            continue
        for new, short in names.items() if old else ():
            name = name.replace(f".{new}.", f".{short}.")
        tensors[name] = t
    told = {"_class_name": "FluxTransformer2DModel", **config, "axes_dims_rope": list(config["axes_dims_rope"])}
    metadata = {"config": json.dumps(told), "model_class": "NunchakuFluxTransformer2dModel" + ("" if old else "V2")}
    return tensors, metadata, model


def in_order(layer, turns):
    """Rows of an adaLN layer as diffusers has them: all shifts, all scales (less the one of 1 + scale), all gates, …"""
    n = layer["codes"].shape[0]
    order = torch.tensor([row * turns + part for part in range(turns) for row in range(n // turns)])
    out = layer | {name: layer[name][order] for name in ("codes", "scales", "zeros", "bias")}
    bias = out["bias"].float().reshape(turns, -1).clone()
    for scale in (1, 4)[: turns // 3]:
        bias[scale] -= 1
    return out | {"bias": bias.flatten().bfloat16()}


class SideBySide(nn.Module):
    """The last layer of a single block: two layers on the two parts of its input."""

    def __init__(self, halves, hidden, rounds):
        super().__init__()
        self.parts, self.hidden = nn.ModuleList(writer.Formula(half, rounds) for half in halves), hidden

    def forward(self, x):
        return self.parts[0](x[..., : self.hidden]) + self.parts[1](x[..., self.hidden :])


def put(model, path, module):
    parent, _, name = path.rpartition(".")
    parent = model.get_submodule(parent)
    if isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(name)] = module
    else:
        setattr(parent, name, module)


def loaded(model, parts, kernel="reference"):
    """The model with every part in its place; every tensor must be there, once."""
    model, seen = copy.deepcopy(model), set()
    state = model.state_dict()
    for part in parts:
        if isinstance(part, Layer):
            n, k = part.shape
            float_layer = model.get_submodule(part.path)
            assert (float_layer.out_features, float_layer.in_features) == (n, k)
            layer = QuantLinear(k, n, part.layout, part.dtype)
            layer.fill(part.slots)
            layer.prepare(kernel)
            put(model, part.path, layer)
            names = {f"{part.path}.weight", f"{part.path}.bias"} & state.keys()
        else:
            state[part.name].copy_(part.tensor)
            names = {part.name}
        assert not names & seen
        seen |= names
    assert seen == state.keys()
    return model


def relative(got, want):
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


@pytest.mark.parametrize("old", [True, False], ids=["old-names", "new-names"])
@pytest.mark.parametrize(("kind", "own_scales"), [("int4", False), ("nvfp4", False), ("nvfp4", True)])
def test_flux_agrees_with_the_formula(dict_source, kind, own_scales, old):
    tensors, metadata, formula = make(kind, old, own_scales)
    source = dict_source(tensors, metadata)
    importer = importers["nunchaku"]
    assert importer.recognizes(source)
    model = loaded(flux(), importer.parts(source))
    with torch.no_grad():
        got, want = model(**inputs())[0], formula(**inputs())[0]
    assert relative(got, want) < 1e-3
    assert len(source.reads) == len(set(source.reads))  # nothing is read twice


def float_layer(module, k):
    """What a Formula stands for without rounding: its weight (N, K) in the raw basis, and its bias."""
    parts = module.parts if isinstance(module, SideBySide) else [module]
    weights, bias = [], 0
    for part in parts:
        layer = part.layer
        if layer["kind"] == "awq":
            return writer.weight_of(layer), layer["bias"].float()
        width = len(layer["smooth"])
        w = writer.weight_of(layer)[:, :width] / layer["smooth"].float()
        weights.append(w + layer["up"].float() @ layer["down"].float())
        bias = bias + layer["bias"].float() + (0.171875 * w.sum(1) if layer["unsigned"] else 0)
    return torch.cat(weights, 1)[:, :k], bias


@pytest.mark.parametrize(("kind", "own_scales"), [("int4", False), ("nvfp4", False), ("nvfp4", True)])
def test_every_layer_agrees_with_the_formula(dict_source, kind, own_scales):
    """Codes and scales bit for bit; outputs to float32's precision on inputs like those after GELU."""
    tensors, metadata, formula = make(kind, own_scales=own_scales)
    layers = [p for p in importers["nunchaku"].parts(dict_source(tensors, metadata)) if isinstance(p, Layer)]
    assert len(layers) == 2 * 14 + 2 * 6
    for part in layers:
        want, (n, k) = formula.get_submodule(part.path), part.shape
        layer = QuantLinear(k, n, part.layout, part.dtype)
        layer.fill(part.slots)
        layer.prepare("reference")
        x = nn.functional.gelu(torch.randn(40, k), approximate="tanh")
        limit = 2e-3 if part.path.endswith("proj_out") else 1e-5  # a bfloat16 bias for two, against each its own
        assert relative(layer(x), want(x)) < limit, part.path
        halves = [h.layer for h in want.parts] if isinstance(want, SideBySide) else [want.layer]
        assert torch.equal(canonical.unpack(part.slots["codes"], 4), torch.cat([h["codes"] for h in halves], 1))
        scales = torch.cat([h["scales"] for h in halves], 1)
        assert torch.equal(part.slots["scales"].float(), scales.float()) and part.slots["scales"].dtype == scales.dtype


def test_formats_and_slots(dict_source):
    tensors, metadata, _ = make("int4")
    parts = {p.path: p for p in importers["nunchaku"].parts(dict_source(tensors, metadata)) if isinstance(p, Layer)}
    fc2, fc1 = parts["transformer_blocks.0.ff.net.2"], parts["transformer_blocks.0.ff.net.0.proj"]
    assert (fc2.layout.weight, fc2.layout.act) == ("int4_g64", "uint4p_g64")
    assert fc2.slots["shift"].shape == () and float(fc2.slots["shift"]) == 0.171875
    assert (fc1.layout.weight, fc1.layout.act) == ("int4_g64", "int4_g64") and "shift" not in fc1.slots
    adaln = parts["transformer_blocks.0.norm1.linear"]
    assert (adaln.layout.weight, adaln.layout.act, adaln.layout.slots) == ("uint4_g64", "", ("zero", "bias"))
    out = parts["single_transformer_blocks.1.proj_out"]
    assert out.layout.act == "" and out.layout.rank == 32 and "activations not rounded" in out.note
    assert not any(p.note for path, p in parts.items() if not path.endswith("proj_out"))


def test_channel_scales_of_fused_layers(dict_source):
    """One scale for each of q, k and v: three layers with one each. Scales that differ within one layer need the row format."""
    tensors, metadata, _ = make("nvfp4")
    parts = {p.path: p for p in importers["nunchaku"].parts(dict_source(tensors, metadata)) if isinstance(p, Layer)}
    scales = [
        float(parts[f"transformer_blocks.0.attn.{name}"].slots["global_scale"]) for name in ("to_q", "to_k", "to_v")
    ]
    assert scales[1] / scales[0] == 0.75 and scales[2] / scales[0] == 1.25
    assert parts["transformer_blocks.0.attn.to_q"].layout.weight == "nvfp4"
    rows = (torch.rand(384) + 0.5).bfloat16()
    tensors["transformer_blocks.0.qkv_proj.wcscales"] = writer.vector_to_file(rows)
    parts = {p.path: p for p in importers["nunchaku"].parts(dict_source(tensors, metadata)) if isinstance(p, Layer)}
    q = parts["transformer_blocks.0.attn.to_q"]
    assert q.layout.weight == "nvfp4_row" and q.slots["global_scale"].shape == (128, 1)
    wtscale = tensors["transformer_blocks.0.qkv_proj.wtscale"].float()
    assert torch.equal(q.slots["global_scale"][:, 0], rows[:128].float() * wtscale)


PADDED = CONFIG | {"num_attention_heads": 3, "num_layers": 1, "num_single_layers": 1}


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_padding_is_cut(dict_source, kind):
    """Hidden size 192, which the kernels pad to 256: nothing of the padding may be left."""
    tensors, metadata, formula = make(kind, config=PADDED)
    assert tensors["transformer_blocks.0.out_proj.qweight"].shape == (256, 128)
    parts = list(importers["nunchaku"].parts(dict_source(tensors, metadata)))
    q = next(p for p in parts if isinstance(p, Layer) and p.path == "transformer_blocks.0.attn.to_q")
    assert q.shape == (192, 192) and q.slots["smooth"].shape == (192,) and q.slots["down"].shape == (16, 192)
    assert q.slots["codes"].shape == (192, 96)
    model = loaded(flux(**PADDED), parts)
    with torch.no_grad():
        assert relative(model(**inputs(PADDED))[0], formula(**inputs(PADDED))[0]) < 1e-3


def test_halves_that_do_not_fit_are_dequantized(dict_source):
    tensors, metadata, formula = make("nvfp4")
    left = writer.random_svdq(128, 128, "int4")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("single_transformer_blocks.0.out_proj.")}
    tensors |= writer.to_file(left, "single_transformer_blocks.0.out_proj")
    formula.single_transformer_blocks[0].proj_out.parts[0] = writer.Formula(left)
    parts = {getattr(p, "name", ""): p for p in importers["nunchaku"].parts(dict_source(tensors, metadata))}
    weight, bias = float_layer(formula.single_transformer_blocks[0].proj_out, 640)
    part = parts["single_transformer_blocks.0.proj_out.weight"]
    assert part.note == "dequantized: its halves do not fit into one layer"
    torch.testing.assert_close(part.tensor.float(), weight, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(
        parts["single_transformer_blocks.0.proj_out.bias"].tensor.float(), bias, rtol=2**-7, atol=1e-3
    )


def test_float16_scales_stay_exact(dict_source):
    tensors, metadata, _ = make("int4")
    layer = writer.random_svdq(128, 128, "int4", dtype=torch.float16)
    tensors = {name: t for name, t in tensors.items() if not name.startswith("transformer_blocks.0.out_proj.")}
    tensors |= writer.to_file(layer, "transformer_blocks.0.out_proj")
    parts = list(importers["nunchaku"].parts(dict_source(tensors, metadata)))
    part = next(p for p in parts if getattr(p, "path", "") == "transformer_blocks.0.attn.to_out.0")
    assert part.slots["scales"].dtype == part.dtype == torch.float16 and part.layout.weight == "int4_g64_f16"
    assert torch.equal(part.slots["scales"], layer["scales"])


# -- other models ------------------------------------------------------------------------------------------------------------------------


def read(dict_source, kind, tensors):
    source = dict_source(tensors, {"config": json.dumps({"_class_name": kind})})
    return {p.path if isinstance(p, Layer) else p.name: p for p in importers["nunchaku"].parts(source)}


def test_qwen_image(dict_source):
    block, tensors = "transformer_blocks.7", {}
    for name, n, k in (
        ("attn.to_qkv", 3, 1),
        ("attn.add_qkv_proj", 3, 1),
        ("img_mlp.net.0.proj", 4, 1),
        ("img_mlp.net.2", 1, 4),
    ):
        layer = writer.random_svdq(n * 128, k * 128, gelu=name.endswith("net.2"))
        tensors |= writer.to_file(layer, f"{block}.{name}", old=False)
    mod = writer.random_awq(768, 128)
    tensors |= writer.to_file(mod, f"{block}.img_mod.1") | {"txt_norm.weight": torch.ones(4)}
    parts = read(dict_source, "QwenImageTransformer2DModel", tensors)
    attention = [f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    rest = [f"{block}.{name}" for name in ("img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1")]
    assert list(parts) == [*attention, *rest, "txt_norm.weight"]
    assert parts[f"{block}.img_mlp.net.2"].layout.act == "uint4p_g64"
    assert torch.equal(parts[f"{block}.img_mod.1"].slots["scales"], in_order(mod, 6)["scales"])


def test_sdxl(dict_source):
    """After GEGLU inputs are not shifted; keys and values of cross-attention are 16-bit."""
    block, tensors = "down_blocks.1.attentions.0.transformer_blocks.1", {}
    for name, n, k in (
        ("attn1.to_qkv", 384, 128),
        ("attn2.to_q", 128, 128),
        ("ff.net.0.proj", 1024, 128),
        ("ff.net.2", 128, 512),
    ):
        tensors |= writer.to_file(writer.random_svdq(n, k), f"{block}.{name}", old=False)
    tensors[f"{block}.attn2.to_k.weight"] = torch.randn(128, 64)
    parts = read(dict_source, "NunchakuSDXLUNet2DConditionModel", tensors)
    names = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "ff.net.0.proj", "ff.net.2", "attn2.to_k.weight")
    assert list(parts) == [f"{block}.{name}" for name in names]
    assert parts[f"{block}.ff.net.2"].layout.act == "int4_g64"


def test_z_image(dict_source):
    """Value and gate are one layer in the file; so they are in blocks that are not quantized."""
    fused = writer.random_svdq(512, 128)
    tensors = writer.to_file(fused, "layers.0.feed_forward.net.0.proj", old=False)
    tensors |= writer.to_file(writer.random_svdq(128, 256), "layers.0.feed_forward.net.2", old=False)
    tensors["noise_refiner.1.feed_forward.net.0.proj.weight"] = weight = torch.randn(512, 128)
    parts = read(dict_source, "ZImageTransformer2DModel", tensors)
    assert torch.equal(canonical.unpack(parts["layers.0.feed_forward.w3"].slots["codes"], 4), fused["codes"][:256])
    assert torch.equal(canonical.unpack(parts["layers.0.feed_forward.w1"].slots["codes"], 4), fused["codes"][256:])
    assert parts["layers.0.feed_forward.w2"].shape == (128, 256)
    assert torch.equal(parts["noise_refiner.1.feed_forward.w1.weight"].tensor, weight[256:])
    feed_forward = importlib.import_module("diffusers.models.transformers.transformer_z_image").FeedForward(128, 256)
    x = torch.randn(3, 128)
    value, gate = feed_forward.w3(x), feed_forward.w1(x)
    torch.testing.assert_close(feed_forward(x), feed_forward.w2(value * nn.functional.silu(gate)))


# -- files that do not fit together ------------------------------------------------------------------------------------------------------

STEM = "transformer_blocks.0.out_proj"
AWQ = "transformer_blocks.0.norm1.linear"


def without(*names):
    return lambda t: [t.pop(name) for name in names]


def with_(name, tensor):
    return lambda t: t.update({name: tensor})


HOSTILE = {
    "no-scales": (without(f"{STEM}.wscales"), f"'{STEM}.wscales'"),
    "no-down": (without(f"{STEM}.lora_down"), f"'{STEM}.proj_down'"),
    "no-up": (without(f"{STEM}.lora_up"), f"'{STEM}.proj_up'"),
    "no-zeros": (without(f"{AWQ}.wzeros"), f"'{AWQ}.wzeros'"),
    "no-adaln-bias": (without(f"{AWQ}.bias"), f"'{AWQ}.bias'"),
    "codes-of-bytes": (with_(f"{STEM}.qweight", torch.zeros(128, 64, dtype=torch.uint8)), f"'{STEM}.qweight'"),
    "codes-of-floats": (with_(f"{STEM}.qweight", torch.zeros(128, 64)), f"'{STEM}.qweight'"),
    "codes-of-three-axes": (with_(f"{STEM}.qweight", torch.zeros(2, 64, 64, dtype=torch.int8)), f"'{STEM}.qweight'"),
    "codes-of-no-rows": (with_(f"{STEM}.qweight", torch.zeros(0, 64, dtype=torch.int8)), f"'{STEM}.qweight'"),
    "rows-that-fill-no-tile": (with_(f"{STEM}.qweight", torch.zeros(96, 64, dtype=torch.int8)), f"'{STEM}.qweight'"),
    "inputs-that-fill-no-tile": (with_(f"{STEM}.qweight", torch.zeros(128, 32, dtype=torch.int8)), f"'{STEM}.qweight'"),
    "another-size-than-the-config": (
        with_(f"{STEM}.qweight", torch.zeros(256, 64, dtype=torch.int8)),
        f"'{STEM}.wscales'",
    ),
    "scales-of-another-shape": (with_(f"{STEM}.wscales", torch.ones(4, 128).bfloat16()), f"'{STEM}.wscales'"),
    "scales-transposed": (with_(f"{STEM}.wscales", torch.ones(128, 2).bfloat16()), f"'{STEM}.wscales'"),
    "scales-of-float32": (with_(f"{STEM}.wscales", torch.ones(2, 128)), f"'{STEM}.wscales'"),
    "scales-of-e5m2": (with_(f"{STEM}.wscales", torch.ones(8, 128).to(torch.float8_e5m2)), f"'{STEM}.wscales'"),
    "scales-of-integers": (with_(f"{STEM}.wscales", torch.ones(2, 128, dtype=torch.int16)), f"'{STEM}.wscales'"),
    "bias-of-another-size": (with_(f"{STEM}.bias", torch.ones(64).bfloat16()), f"'{STEM}.bias'"),
    "bias-of-integers": (with_(f"{STEM}.bias", torch.ones(128, dtype=torch.int64)), f"'{STEM}.bias'"),
    "smoothing-of-another-size": (with_(f"{STEM}.smooth", torch.ones(129).bfloat16()), f"'{STEM}.smooth'"),
    "rank-of-8": (with_(f"{STEM}.lora_down", torch.ones(128, 8).bfloat16()), f"'{STEM}.lora_down'"),
    "ranks-that-differ": (with_(f"{STEM}.lora_up", torch.ones(128, 32).bfloat16()), f"'{STEM}.lora_up'"),
    "low-rank-without-shape": (with_(f"{STEM}.lora_down", torch.tensor(1.0)), f"'{STEM}.lora_down'"),
    "the-same-twice": (with_(f"{STEM}.smooth_factor", torch.ones(128).bfloat16()), f"'{STEM}.smooth"),
    "an-unknown-part": (with_(f"{STEM}.wzzz", torch.ones(1)), f"'{STEM}.wzzz'"),
    "zeros-of-another-dtype": (with_(f"{AWQ}.wzeros", torch.ones(2, 768).half()), f"'{AWQ}.wzeros'"),
    "words-of-odd-width": (with_(f"{AWQ}.qweight", torch.zeros(192, 33, dtype=torch.int32)), f"'{AWQ}.qweight'"),
    "half-a-layer": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("single_transformer_blocks.0.mlp_fc2.")],
        "'single_transformer_blocks.0.mlp_fc2.qweight'",
    ),
}


@pytest.fixture(scope="module")
def whole_file():
    torch.manual_seed(0)
    return make("int4")[:2]


@pytest.mark.parametrize("name", HOSTILE)
def test_tensors_that_do_not_fit_are_named(dict_source, whole_file, name):
    tensors, metadata = dict(whole_file[0]), whole_file[1]
    change, said = HOSTILE[name]
    change(tensors)
    with pytest.raises(BadCheckpoint) as caught:
        list(importers["nunchaku"].parts(dict_source(tensors, metadata)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_that_the_config_denies(dict_source, whole_file):
    told = json.loads(whole_file[1]["config"]) | {"attention_head_dim": 128}
    with pytest.raises(BadCheckpoint, match=r"qkv_proj.qweight' is int8 \(384, 64\): wanted 768 x 256"):
        list(importers["nunchaku"].parts(dict_source(whole_file[0], {"config": json.dumps(told)})))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_tensor_scales_must_be_finite(dict_source, value):
    tensors, metadata, _ = make("nvfp4")
    tensors[f"{STEM}.wtscale"] = torch.tensor([float(value)]).bfloat16()
    with pytest.raises(BadCheckpoint, match=rf"'{STEM}.wtscale'.*finite"):
        list(importers["nunchaku"].parts(dict_source(tensors, metadata)))


@pytest.mark.parametrize(
    "metadata", [{}, {"config": '{"_class_name": "SanaTransformer2DModel"}'}, {"config": "[1]"}, {"config": "{"}]
)
def test_files_of_unknown_models(dict_source, whole_file, metadata):
    with pytest.raises(BadCheckpoint):
        list(importers["nunchaku"].parts(dict_source(whole_file[0], metadata)))


def test_a_folder_of_two_files(tmp_path):
    """The older kind: quantized and other layers in a file each, the config beside them."""
    from safetensors.torch import save_file

    from qgen.io.peers.source import open_source

    tensors, metadata, formula = make("int4")
    inside = {name: t.contiguous() for name, t in tensors.items() if "transformer_blocks" in name}
    save_file(inside, tmp_path / "transformer_blocks.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in inside}, tmp_path / "unquantized_layers.safetensors")
    (tmp_path / "config.json").write_text(metadata["config"])
    source = open_source(tmp_path)
    assert importers["nunchaku"].recognizes(source)
    model = loaded(flux(), importers["nunchaku"].parts(source))
    with torch.no_grad():
        assert relative(model(**inputs())[0], formula(**inputs())[0]) < 1e-3


CHANGES = {
    "drop": lambda t: None,
    "transpose": lambda t: t.T.contiguous() if t.ndim == 2 else t[None],
    "halve": lambda t: t[: len(t) // 2].contiguous(),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[0].clone(),
    "float": lambda t: t.float(),
    "half": lambda t: t.half() if t.is_floating_point() else t.to(torch.int64),
    "bytes": lambda t: t.contiguous().view(torch.uint8) if t.ndim else t,
    "twice": lambda t: torch.cat([t, t]),
}


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_no_change_of_a_tensor_escapes_as_another_error(dict_source, kind):
    """Each tensor of each kind of layer, changed in each way: the file still means something, or BadCheckpoint says what is wrong."""
    block = "transformer_blocks.0"
    whole = writer.to_file(writer.random_svdq(384, 128, kind), f"{block}.attn.to_qkv", old=False)
    whole |= writer.to_file(writer.random_awq(768, 128), f"{block}.img_mod.1")
    metadata = {"config": json.dumps({"_class_name": "QwenImageTransformer2DModel"})}
    refused = 0
    for name, tensor in whole.items():
        for change in CHANGES.values():
            changed = change(tensor)
            tensors = whole | {name: changed} if changed is not None else {n: t for n, t in whole.items() if n != name}
            try:
                list(importers["nunchaku"].parts(dict_source(tensors, metadata)))
            except BadCheckpoint:
                refused += 1
    assert refused > 0.6 * len(whole) * len(CHANGES)


@pytest.mark.parametrize("value", [10**19, -1, 0, 2**40], ids=["long", "negative", "zero", "large"])
def test_absurd_sizes_in_the_config(dict_source, whole_file, value):
    told = json.loads(whole_file[1]["config"]) | {"num_attention_heads": value, "attention_head_dim": value}
    with pytest.raises(BadCheckpoint, match=r"qkv_proj.qweight.* config tells"):
        list(importers["nunchaku"].parts(dict_source(whole_file[0], {"config": json.dumps(told)})))
