"""GGUF against the `gguf` package and diffusers: values bit for bit, bytes there and back, and a model that runs."""

import struct

import numpy as np
import pytest
import torch

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Model, Plain, exporters, importers
from qgen.io.peers.floats import dequantized
from qgen.io.peers.gguf_blocks import READERS
from qgen.io.peers.gguf_source import BLOCK_TYPES, open_gguf
from qgen.nn.packed import Layout

gguf = pytest.importorskip("gguf", reason="the truth is the format's own package")

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
          "Q5_K": (0, 2), "Q6_K": (208,)}  # fmt: skip
SPECIAL = np.array([0.0, -0.0, 6e-8, -6e-8, 65504, -65504, 2**-14, 1], dtype=np.float16).view(np.uint16)


def random_blocks(kind, n, k, seed=0):
    """Bytes (N, bytes per row) of a type with every bit random; float16 scales are finite, the special ones among them."""
    _, block, nbytes = BLOCK_TYPES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n * (k // block), nbytes), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        halves = raw[:, at : at + 2].copy().view(np.uint16)
        halves = np.where((halves & 0x7C00) == 0x7C00, halves & 0xBFFF, halves)
        halves[: len(SPECIAL), 0] = SPECIAL[: len(halves)]
        raw[:, at : at + 2] = halves.astype(np.uint16).view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = np.where(raw[:, 0] == 255, 254, raw[:, 0])
    if kind == "NVFP4":
        raw[:, :4] = np.where(raw[:, :4] % 128 == 127, 126, raw[:, :4] % 128)
    return raw.reshape(n, -1)


def written(path, tensors, **texts):
    """tensors: {name: array | (raw, type)}."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, value in texts.items():
        writer.add_array(name, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=gguf.GGMLQuantizationType[value[1]])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return open_gguf(path)


def parts(source):
    assert importers["gguf"].recognizes(source)
    return {part.path if isinstance(part, Layer) else part.name: part for part in importers["gguf"].parts(source)}


def theirs(raw, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(np.float32))


@pytest.mark.parametrize("kind", READERS)
def test_a_million_values_are_the_packages(kind, tmp_path):
    raw = random_blocks(kind, 1024, 1024)
    bias = np.arange(1024, dtype="f4")
    (layer,) = parts(written(tmp_path / "a.gguf", {"x.weight": (raw, kind), "x.bias": bias})).values()
    assert (
        layer.shape == (1024, 1024) and layer.note == kind and torch.equal(layer.slots["bias"], torch.from_numpy(bias))
    )
    weight, _ = dequantized(layer)
    want = theirs(raw, kind)
    assert torch.equal(weight, want) and torch.equal(weight.signbit() | (weight == 0), want.signbit() | (want == 0))
    assert formats.get(layer.layout.weight).bits == min(
        b for b in (2, 3, 4, 5, 6, 8) if f"Q{b}" in kind or (b == 4 and "FP4" in kind)
    )


@pytest.mark.parametrize("kind", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"))
def test_what_the_package_quantizes(kind, tmp_path):
    raw = gguf.quants.quantize(
        np.random.default_rng(0).normal(size=(64, 256)).astype("f4"), gguf.GGMLQuantizationType[kind]
    )
    (layer,) = parts(written(tmp_path / "a.gguf", {"x.weight": (raw, kind)})).values()
    assert torch.equal(dequantized(layer)[0], theirs(raw, kind))


@pytest.mark.parametrize("kind", ("IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_S", "TQ1_0", "TQ2_0"))
def test_other_types_are_dequantized_and_say_so(kind, tmp_path):
    raw = gguf_finite(kind)
    found = parts(written(tmp_path / "a.gguf", {"x.weight": (raw, kind), "x.bias": np.ones(8, "f4")}))
    assert found["x.weight"].note == f"dequantized: {kind}" and set(found) == {"x.weight", "x.bias"}
    assert torch.equal(found["x.weight"].tensor, theirs(raw, kind))


def gguf_finite(kind):
    """Random blocks (8 rows of 512) whose values are finite, whatever the layout: small bytes where a float16's exponent could be."""
    raw = random_blocks(kind, 8, 512) & 0x3B
    assert bool(theirs(raw, kind).isfinite().all())
    return raw


def test_what_is_no_layer_stays_a_tensor(tmp_path):
    raw = random_blocks("Q4_0", 8, 64)
    tensors = {
        "token_embd.weight": (raw, "Q4_0"),
        "scale_shift_table": (random_blocks("Q8_0", 8, 64), "Q8_0"),
        "norm.weight": np.ones(8, "f4"),
        "half.weight": np.ones((2, 3), "f2"),
    }
    found = parts(written(tmp_path / "a.gguf", tensors))
    assert all(isinstance(part, Plain) for part in found.values()) and list(found) == list(tensors)
    assert torch.equal(found["token_embd.weight"].tensor, theirs(raw, "Q4_0"))
    assert found["half.weight"].tensor.dtype == torch.float16 and found["norm.weight"].note == ""


def test_bfloat16(tmp_path):
    want = torch.randn(4, 6).bfloat16()
    found = parts(written(tmp_path / "a.gguf", {"x.weight": (want.view(torch.uint8).numpy(), "BF16")}))
    assert torch.equal(found["x.weight"].tensor, want)


def test_folded_tensors(tmp_path):
    """A convolution whose rows a writer for ComfyUI folded to fill blocks: kept where blocks do not straddle outputs."""
    raw = random_blocks("Q4_0", 9, 256)
    texts = {
        "comfy.gguf.orig_shape.good.weight": [8, 32, 3, 3],
        "comfy.gguf.orig_shape.bad.weight": [36, 64, 1],
        "comfy.gguf.orig_shape.odd.weight": [48, 16, 3, 1],
    }
    found = parts(written(tmp_path / "a.gguf", {f"{n}.weight": (raw, "Q4_0") for n in ("good", "bad", "odd")}, **texts))
    assert found["good"].shape == (8, 32, 3, 3) and found["good"].kind == "conv2d"
    want = theirs(raw, "Q4_0")
    assert torch.equal(dequantized(found["good"])[0], want.reshape(8, 32, 3, 3))
    assert torch.equal(found["bad.weight"].tensor, want.reshape(36, 64, 1))
    assert torch.equal(
        found["odd.weight"].tensor, want.reshape(48, 16, 3, 1)
    )  # 48 values a row are one and a half blocks


@pytest.mark.parametrize(
    ("kind", "at", "value"), [("Q4_0", 0, 0x7C00), ("Q4_1", 2, 0x7E00), ("Q6_K", 208, 0xFC00), ("Q4_K", 2, 0x7C01)]
)
def test_scales_that_are_no_numbers_are_refused(kind, at, value, tmp_path):
    raw = random_blocks(kind, 4, 256)
    raw[1, at : at + 2] = np.frombuffer(struct.pack("<H", value), np.uint8)
    source = written(tmp_path / "a.gguf", {"x.weight": (raw, kind)})
    with pytest.raises(BadCheckpoint, match=r"a\.gguf: 'x\.weight' holds scales that are NaN"):
        list(importers["gguf"].parts(source))


@pytest.mark.parametrize(("kind", "at", "value"), [("MXFP4", 0, 255), ("NVFP4", 2, 127), ("NVFP4", 1, 0x80)])
def test_scales_that_mean_two_things_are_refused(kind, at, value, tmp_path):
    raw = random_blocks(kind, 4, 256)
    raw[1, at] = value
    source = written(tmp_path / "a.gguf", {"x.weight": (raw, kind)})
    with pytest.raises(BadCheckpoint, match=r"'x\.weight'"):
        list(importers["gguf"].parts(source))


def test_a_bias_of_another_size_is_refused(tmp_path):
    source = written(
        tmp_path / "a.gguf", {"x.weight": (random_blocks("Q4_0", 4, 64), "Q4_0"), "x.bias": np.ones(5, "f4")}
    )
    with pytest.raises(BadCheckpoint, match=r"'x\.bias' must have the shape \[4\]"):
        list(importers["gguf"].parts(source))


# -- out ----------------------------------------------------------------------------------------------------------------


def layer(path, name, weight, act="", **more):
    q = formats.get(name).quantize(weight)
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero, **more}
    slots = {slot: t for slot, t in slots.items() if t is not None}
    present = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    rank = more["down"].shape[0] if "down" in more else 0
    return Layer(path, tuple(weight.shape), Layout(name, act, rank, slots=present), slots)


def test_golden_q4_0(tmp_path):
    """x = -16 … 15, written by hand in the format's description."""
    golden = bytes.fromhex("0040809191a2a2b3b3c4c4d5d5e6e6f7f7f8")
    raw = np.frombuffer(golden, np.uint8)[None]
    (found,) = parts(written(tmp_path / "a.gguf", {"x.weight": (raw, "Q4_0")})).values()
    exporters["gguf"].write([found], tmp_path / "b.gguf", about=Model())
    assert open_gguf(tmp_path / "b.gguf").read("x.weight").numpy().tobytes() == golden
    assert dequantized(found)[0][0, :3].tolist() == [-16, -14, -14]


@pytest.mark.parametrize("kind", ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"))
def test_bytes_come_back(kind, tmp_path):
    raw = random_blocks(kind, 64, 256)
    found = parts(written(tmp_path / "a.gguf", {"x.weight": (raw, kind), "x.bias": np.ones(64, "f4")})).values()
    assert exporters["gguf"].write(found, tmp_path / "b.gguf", about=Model("FluxTransformer2DModel")) == []
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    again = {tensor.name: tensor for tensor in reader.tensors}
    assert again["x.weight"].tensor_type.name == kind and np.array_equal(again["x.weight"].data, raw)
    assert np.array_equal(again["x.bias"].data, np.ones(64, "f4"))
    assert reader.fields["general.architecture"].contents() == "flux"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("int4_g32", "Q4_0"), ("int4_g64", "Q4_0"), ("int4_row", None), ("uint4_g128", "Q4_1"), ("int8_g64", "Q8_0")],
)
def test_exact_layers(name, kind, tmp_path):
    """Wider blocks repeat their scale; float32 scales that float16 does not hold send the layer to Q8_0."""
    made = layer("x", name, torch.randn(16, 256))
    notes = exporters["gguf"].write([made], tmp_path / "a.gguf", about=Model())
    (tensor,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    values = theirs(tensor.data, tensor.tensor_type.name)
    if kind is None:
        assert tensor.tensor_type.name == "Q8_0" and "no GGUF type holds int4_row exactly" in notes[0]
        assert (values - dequantized(made)[0]).norm() < 0.01 * values.norm()
    else:
        assert tensor.tensor_type.name == kind and notes == [] and torch.equal(values, dequantized(made)[0])


def test_what_no_type_holds(tmp_path):
    n, k = 32, 128
    weight = torch.randn(n, k)
    made = [
        layer(
            "lora",
            "int4_g64",
            weight,
            down=torch.randn(4, k),
            up=torch.randn(n, 4),
            smooth=torch.rand(k) + 0.5,
            bias=torch.ones(n),
        ),
        layer("fp4", "nvfp4", weight),
        layer("shifted", "int4_g64", weight, act="uint4p_g64", shift=torch.tensor(0.5), bias=torch.ones(n)),
        layer("acts", "int4_g64", weight, act="int4_g64"),
        layer("narrow", "int4_g16", torch.randn(8, 48)),
    ]
    notes = exporters["gguf"].write(made, tmp_path / "a.gguf", about=Model())
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(notes) == 5 and "with rank 4 and smoothing" in notes[0] and "stored as 16 bits" in notes[4]
    assert notes[3] == "acts: activations are no longer rounded to int4_g64"
    for part in made[:3]:
        assert found[f"{part.path}.weight"].tensor_type.name == "Q8_0"
        want = theirs(gguf.quants.quantize(dequantized(part)[0].numpy(), gguf.GGMLQuantizationType.Q8_0), "Q8_0")
        assert torch.equal(theirs(found[f"{part.path}.weight"].data, "Q8_0"), want)
    assert np.array_equal(found["shifted.bias"].data, dequantized(made[2])[1].numpy()) and not np.array_equal(
        found["shifted.bias"].data, np.ones(n)
    )


def test_plain_tensors(tmp_path):
    tensors = {
        "exact.weight": torch.arange(6.0).view(2, 3).bfloat16(),
        "tiny.weight": torch.full((2, 4), 2.0**-40).bfloat16(),
        "conv.weight": torch.full((2, 1, 1, 4), 2.0**-40).bfloat16(),
        "norm.weight": torch.randn(5).bfloat16(),
        "wide": torch.randn(3, 3),
        "steps": torch.arange(4),
    }
    exporters["gguf"].write([Plain(name, t) for name, t in tensors.items()], tmp_path / "a.gguf", about=Model())
    source = open_gguf(tmp_path / "a.gguf")
    kinds = {
        "exact.weight": "F16",
        "tiny.weight": "BF16",
        "conv.weight": "F32",
        "norm.weight": "F32",
        "wide": "F32",
        "steps": "I64",
    }
    assert source.types == kinds
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name).to(tensor.dtype), tensor)


def test_nothing_is_left_of_a_failure(tmp_path):
    def broken():
        yield Plain("a", torch.ones(3))
        raise KeyboardInterrupt

    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        exporters["gguf"].write(broken(), tmp_path / "a.gguf", about=Model())
    with pytest.raises(ValueError, match="'flag' is bool"):
        exporters["gguf"].write([Plain("flag", torch.ones(3, dtype=torch.bool))], tmp_path / "a.gguf", about=Model())
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == b"old"


def test_diffusers_runs_what_is_written(tmp_path):
    """A small Flux: diffusers' own loader, its dequantized weights equal to qgen's, and its images those of the dequantized model."""
    pytest.importorskip("accelerate", reason="diffusers' GGUF loader wants it")
    diffusers = pytest.importorskip("diffusers", reason="the reader is diffusers'")
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        pooled_projection_dim=64, axes_dims_rope=[8, 12, 12],
    ).bfloat16().eval()  # fmt: skip
    model.save_config(tmp_path / "config")
    names = ["int4_g32", "int8_g32_f16", "uint4_g64", "nvfp4", "int4_g64", "int8_g64"]
    made, quantized = [], 0
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "blocks" in path:
            made.append(layer(path, names[quantized % len(names)], module.weight.data, bias=module.bias.data))
            quantized += 1
        else:
            made += [Plain(f"{path}.{n}", p.data) for n, p in module.named_parameters(recurse=False)]
    exporters["gguf"].write(made, tmp_path / "flux.gguf", about=Model("FluxTransformer2DModel"))
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    ours = parts(open_gguf(tmp_path / "flux.gguf"))
    seen = {}
    for path, module in loaded.named_modules():
        if type(module).__name__ != "GGUFLinear" or path not in ours:
            continue
        kind, found = module.weight.quant_type.name, dequantize_gguf_tensor(module.weight)
        seen[kind] = seen.get(kind, 0) + 1
        if kind == "Q4_1":  # diffusers works in float16 and so rounds twice: d · q, then + m
            slots = ours[path].slots
            codes = formats.get("uint4_g32_f16").unpack(slots["codes"]).half().unflatten(1, (-1, 32))
            want = (codes * slots["scales"][..., None] + slots["zero"][..., None]).flatten(1)
            assert (want.float() - dequantized(ours[path])[0]).abs().max() < 2e-3
        else:
            want = dequantized(ours[path])[0].half()
        assert found.dtype == torch.float16 and torch.equal(found, want), path
    assert sum(seen.values()) == quantized and set(seen) == {"Q4_0", "Q4_1", "Q8_0"}
    with torch.no_grad():
        for path, module in loaded.named_modules():
            if type(module).__name__ == "GGUFLinear" and path in ours:
                model.get_submodule(path).weight.copy_(dequantize_gguf_tensor(module.weight))
        inputs = {
            "hidden_states": torch.randn(1, 16, 16).bfloat16(), "encoder_hidden_states": torch.randn(1, 8, 64).bfloat16(),
            "pooled_projections": torch.randn(1, 64).bfloat16(), "timestep": torch.tensor([0.5]).bfloat16(),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3),
        }  # fmt: skip
        want, got = model(**inputs).sample.float(), loaded(**inputs).sample.float()
    assert (got - want).norm() < 5e-3 * want.norm()
