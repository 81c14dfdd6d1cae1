"""ComfyUI's files as streams of parts: written and read back bit for bit, changes are said, hostile files are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qgen.errors import BadCheckpoint, BadData
from qgen.io.peers import comfy_marks, exporters, importers
from qgen.io.peers.base import Layer, Model, Plain
from qgen.io.peers.comfy_formats import FORMATS
from qgen.io.peers.floats import dequantized
from qgen.io.peers.source import open_source
from qgen.nn.packed import Layout

COMFY = exporters["comfy"]
N, K = 128, 256


def weight(n=N, k=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.exp(torch.randn(n, 1, generator=generator))


def layer(name, path="block.lin", bias=True):
    made = FORMATS[name].quantize(path, weight(), torch.bfloat16)
    return with_slots(made, bias=torch.randn(N).bfloat16()) if bias else made


def with_slots(made, **slots):
    slots = {**made.slots, **slots}
    present = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    rank = slots["down"].shape[0] if "down" in slots else 0
    return replace(made, slots=slots, layout=replace(made.layout, slots=present, rank=rank))


def svdquant(act="int4_g64", dtype=torch.float16, weight_format="int4_g64"):
    """A layer as qgen's recipes make it: smoothing and branch in float16."""
    from qgen import formats

    q = formats.get(weight_format).quantize(weight())
    slots = {"codes": q.codes, "scales": q.scales, "smooth": torch.rand(K).add(0.5).to(dtype)}
    slots |= {"global_scale": q.global_scale} if q.global_scale is not None else {}
    slots |= {
        "down": torch.randn(10, K).to(dtype),
        "up": torch.randn(N, 10).to(dtype),
        "bias": torch.randn(N).bfloat16(),
    }
    present = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    return Layer("block.lin", (N, K), Layout(weight_format, act, 10, 0, present), slots)


def written(tmp_path, parts, **options):
    """(parts read back, lines of the report)."""
    said = COMFY.write(iter(parts), tmp_path / "x.safetensors", about=Model(), **options)
    return list(read(tmp_path)), said


def read(tmp_path):
    source = open_source(tmp_path / "x.safetensors")
    assert importers["comfy"].recognizes(source)
    return importers["comfy"].parts(source)


def equal(a, b):
    same = (a.path, a.shape, a.layout.weight, a.layout.act, a.layout.rank, a.layout.hadamard)
    assert same == (b.path, b.shape, b.layout.weight, b.layout.act, b.layout.rank, b.layout.hadamard)
    assert sorted(a.slots) == sorted(b.slots)
    for slot in a.slots:
        assert a.slots[slot].dtype == b.slots[slot].dtype, slot
        assert torch.equal(a.slots[slot].float(), b.slots[slot].float()), slot
    return True


# -- there and back ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_of_its_own_format_is_kept_bit_for_bit(name, tmp_path):
    """The default export writes it as it is, and the import of that is the layer again."""
    before = layer(name)
    parts = [Plain("first.weight", torch.ones(3)), before, Plain("last", torch.arange(4))]
    found, said = written(tmp_path, parts, **({} if FORMATS[name].stock else {"format": name}))
    (back,) = [p for p in found if isinstance(p, Layer)]
    others = sorted((p for p in found if isinstance(p, Plain)), key=lambda p: p.name)
    assert said == [] and equal(before, back)
    assert [p.name for p in others] == ["first.weight", "last"] and torch.equal(others[1].tensor, torch.arange(4))


def test_smoothing_without_a_branch_is_exact_in_nvfp4(tmp_path):
    before = with_slots(layer("nvfp4"), smooth=2.0 ** torch.randint(-3, 4, (K,)).float())
    (after,), said = written(tmp_path, [before])
    assert said == [] and equal(before, after)
    stored = load_file(tmp_path / "x.safetensors")
    assert torch.equal(stored["block.lin.pre_quant_scale"] * before.slots["smooth"], torch.ones(K))


def test_static_float8_activations(tmp_path):
    made = with_slots(layer("fp8"), act_scale=torch.tensor([0.25]))
    before = replace(made, layout=replace(made.layout, act="fp8_e4m3_tensor"))
    (after,), said = written(tmp_path, [before])
    assert said == [] and equal(before, after)


def test_a_weight_only_int4_layer_is_exact_in_awq(tmp_path):
    before = replace(layer("svdquant_w4a4"), layout=Layout("int4_g64", "", slots=("bias",)))
    before = replace(before, slots={s: t for s, t in before.slots.items() if s not in ("down", "up")})
    line = "dequantized: block.lin: not every ComfyUI loads awq_w4a16: ask for it by name"
    assert COMFY.write([before], tmp_path / "x.safetensors", about=Model()) == [line]
    (after,), said = written(tmp_path, [before], format="awq_w4a16")
    assert (
        said == [] and after.layout.weight == "int4o_g64" and torch.equal(after.slots["codes"], before.slots["codes"])
    )
    assert torch.equal(dequantized(after)[0], dequantized(before)[0])


def test_marks_are_what_stock_comfyui_reads(tmp_path):
    written(tmp_path, [layer("convrot_w4a4")])
    stored = load_file(tmp_path / "x.safetensors")
    mark = json.loads(bytes(stored["block.lin.comfy_quant"].tolist()))
    assert mark == {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int4"}


# -- what cannot be kept -------------------------------------------------------------------------------------------------
def test_without_a_format_other_layers_become_floats(tmp_path):
    before = svdquant(act="uint4_g64")
    said = COMFY.write([before], tmp_path / "x.safetensors", about=Model())
    assert len(said) == 1 and "no format of ComfyUI's is int4_g64 x uint4_g64" in said[0]
    stored = load_file(tmp_path / "x.safetensors")
    values, bias = dequantized(before)
    assert sorted(stored) == ["block.lin.bias", "block.lin.weight"] and torch.equal(stored["block.lin.bias"], bias)
    assert torch.equal(stored["block.lin.weight"], values.bfloat16())


def test_svdquant_keeps_codes_and_branch_and_says_what_changed(tmp_path):
    before = svdquant(act="uint4_g64")
    (after,), said = written(tmp_path, [before], format="svdquant_w4a4")
    assert len(said) == 1 and said[0].startswith("requantized to svdquant_w4a4: block.lin: ") and "uint4_g64" in said[0]
    assert torch.equal(after.slots["codes"], before.slots["codes"]) and after.layout.act == "int4_g64"
    assert after.layout.rank == 16 and not after.slots["down"][10:].any()  # files hold multiples of 16
    assert torch.equal(after.slots["down"][:10], before.slots["down"].bfloat16())


def test_an_nvfp4_branch_keeps_its_branch_in_svdquant(tmp_path):
    before = svdquant("nvfp4_dynamic", torch.bfloat16, "nvfp4")
    (after,), said = written(tmp_path, [before], format="svdquant_w4a4")
    assert len(said) == 1 and torch.equal(after.slots["down"][:10], before.slots["down"])
    assert close(after, before) < 0.13  # two roundings to 4 bits; a fresh SVD of the rounded weight would not do better


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "svdquant_w4a4"])
def test_an_explicit_format_requantizes(name, tmp_path):
    """The weight stays what the layer stood for, up to the new format's own error, its shift undone in the bias."""
    before = svdquant("uint4p_g64", torch.bfloat16)
    before = with_slots(before, shift=torch.tensor(0.25).bfloat16())
    (after,), said = written(tmp_path, [before], format=name)
    assert len(said) == 1 and said[0].startswith(f"requantized to {name}: block.lin: ")
    limit = {"fp8": 0.03, "fp8_e5m2": 0.06, "mxfp8": 0.03, "int8": 0.02, "int8_convrot": 0.02}.get(name, 0.2)
    assert close(after, before) < limit
    assert torch.equal(after.slots["bias"], dequantized(before)[1])


def close(a, b):
    (x, _), (y, _) = dequantized(a), dequantized(b)
    return float((x - y).norm() / y.norm())


def test_the_second_format_keeps_what_is_exact_in_it(tmp_path):
    awq, svd = layer("awq_w4a16", "block.mod"), layer("svdquant_w4a4", "block.lin")
    parts, said = written(tmp_path, [awq, svd], format="svdquant_w4a4,awq_w4a16")
    assert said == [] and sorted(p.layout.weight for p in parts) == ["int4_g64", "int4o_g64"]


def test_convolutions_and_odd_shapes_stay_float(tmp_path):
    conv = replace(layer("fp8"), shape=(N, 64, 2, 2))
    narrow = FORMATS["fp8"].quantize("narrow", weight(24, 40), torch.bfloat16)
    said = COMFY.write([conv, narrow], tmp_path / "x.safetensors", about=Model(), format="nvfp4")
    assert said == ["dequantized: block.lin: a convolution", "dequantized: narrow: N=24, K=40 are no multiples of 16"]
    stored = load_file(tmp_path / "x.safetensors")
    assert stored["block.lin.weight"].shape == (N, 64, 2, 2) and stored["narrow.weight"].dtype == torch.bfloat16


def test_quantizing_on_the_way(tmp_path):
    """Float weights that the caller names become layers, whatever else is there stays, and what does not fit is said."""
    w = {"blocks.0.a": weight(), "blocks.0.odd": weight(24, 40), "embed": weight()}
    parts = [Plain(f"{path}.weight", t.bfloat16()) for path, t in w.items()] + [Plain("blocks.0.a.bias", torch.ones(N))]
    found, said = written(tmp_path, parts, format="nvfp4", eligible=lambda name, shape: name.startswith("blocks."))
    layers = [p for p in found if isinstance(p, Layer)]
    assert [p.path for p in layers] == ["blocks.0.a"] and torch.equal(layers[0].slots["bias"], torch.ones(N))
    assert said == ["left in bfloat16: blocks.0.odd: N=24, K=40 are no multiples of 16"]
    plain = {p.name: p.tensor for p in found if isinstance(p, Plain)}
    assert torch.equal(plain["embed.weight"], w["embed"].bfloat16()) and "blocks.0.odd.weight" in plain
    assert (
        close(layers[0], replace(FORMATS["nvfp4"].quantize("x", w["blocks.0.a"].bfloat16().float(), torch.bfloat16)))
        == 0
    )


def test_nothing_is_written_when_something_is_wrong(tmp_path):
    target, parts = tmp_path / "x.safetensors", [Plain("a.weight", torch.full((64, 64), torch.nan))]
    with pytest.raises(ValueError, match=r"unknown ComfyUI format 'nvfp5'.*did you mean 'nvfp4'"):
        COMFY.write(parts, target, about=Model(), format="nvfp5")
    with pytest.raises(ValueError, match="need a format"):
        COMFY.write(parts, target, about=Model(), eligible=lambda name, shape: True)
    with pytest.raises(BadData, match=r"'a\.weight' holds NaN"):
        COMFY.write(parts, target, about=Model(), format="nvfp4", eligible=lambda name, shape: True)
    assert list(tmp_path.iterdir()) == []


def test_texts_of_the_header(tmp_path):
    texts = {"modelspec.title": "x", "qgen": "{}", "_quantization_metadata": "{}"}
    COMFY.write([Plain("a", torch.ones(2))], tmp_path / "x.safetensors", about=Model(metadata=texts))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.title": "x"}


# -- what others wrote ---------------------------------------------------------------------------------------------------
def file_of(name, **options):
    tensors, more = FORMATS[name].store(layer(name))
    tensors = {f"block.lin.{suffix}": tensor for suffix, tensor in tensors.items()}
    mark = comfy_marks.tensor(FORMATS[name].format, **{**more, **options})
    return {**tensors, "block.lin.comfy_quant": mark, "norm.weight": torch.ones(4)}


def parts_of(dict_source, tensors, metadata=None):
    source = dict_source(tensors, metadata)
    assert importers["comfy"].recognizes(source)
    return list(importers["comfy"].parts(source))


def test_marks_in_the_header(dict_source):
    tensors = file_of("int8")
    mark = tensors.pop("block.lin.comfy_quant")
    text = json.dumps({"format_version": "1.0", "layers": {"block.lin": json.loads(bytes(mark.tolist()))}})
    (found, _) = parts_of(dict_source, tensors, {"_quantization_metadata": text})
    assert found.layout.weight == "int8_row"


def test_the_older_scaled_fp8(dict_source):
    tensors = file_of("fp8")
    del tensors["block.lin.comfy_quant"]
    tensors["block.lin.scale_weight"] = tensors.pop("block.lin.weight_scale")
    tensors["block.lin.scale_input"] = torch.tensor([0.5])
    tensors["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    tensors["other.weight"] = torch.ones(8, 8).to(torch.float8_e5m2)
    found, _, other = parts_of(dict_source, tensors)
    assert found.layout.weight == "fp8_e4m3_tensor" and found.slots["act_scale"].tolist() == [0.5]
    assert other.tensor.dtype == torch.bfloat16 and "without a scale" in other.note


@pytest.mark.parametrize("name", ["int8_convrot", "convrot_w4a4"])
def test_a_rotated_code_without_a_negative_is_read_as_floats(name, dict_source):
    """-128 or -8 where the sign changes, in column 63; the values are those that comfy-kitchen gives that code."""
    tensors = file_of(name)
    codes = tensors["block.lin.weight"].clone()
    codes[0, 63 if name == "int8_convrot" else 31] = -128  # as nibbles: 0, -8
    tensors["block.lin.weight"] = codes
    weight, bias, _ = parts_of(dict_source, tensors)
    assert isinstance(weight, Plain) and weight.note.startswith("dequantized: ") and bias.name == "block.lin.bias"
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager", reason="the truth is comfy-kitchen's")
    undo = {
        "int8_convrot": kitchen.quantization.dequantize_int8_convrot_weight,
        "convrot_w4a4": kitchen.convrot_w4a4.dequantize_convrot_w4a4_weight,
    }[name]
    values = undo(codes, tensors["block.lin.weight_scale"], 256)
    assert torch.equal(weight.tensor, values.bfloat16())


@pytest.mark.parametrize("scale", ["()", "(1,)", "(N,)", "(N, 1)"])
def test_int8_scales_of_every_shape(scale, dict_source):
    tensors = file_of("int8")
    full = tensors["block.lin.weight_scale"]
    value = {"()": full[0, 0], "(1,)": full[:1, 0], "(N,)": full[:, 0], "(N, 1)": full}[scale]
    tensors["block.lin.weight_scale"] = value.clone()
    found = parts_of(dict_source, tensors)[0]
    assert torch.equal(found.slots["scales"], value.reshape(-1, 1).expand(N, 1))


def test_padded_rows_are_cut_to_the_bias(dict_source):
    tensors = file_of("nvfp4")
    tensors["block.lin.bias"] = tensors["block.lin.bias"][: N - 5].clone()
    found = parts_of(dict_source, tensors)[0]
    assert found.shape == (N - 5, K) and found.slots["scales"].shape == (N - 5, K // 16)


def test_parts_come_one_by_one(dict_source):
    """A layer's tensors are read when the stream comes to it, and once."""
    tensors = {**file_of("nvfp4"), **{f"later.{i}": torch.ones(2) for i in range(3)}}
    source = dict_source(tensors)
    stream = importers["comfy"].parts(source)
    next(stream)
    assert all(not name.startswith("later") for name in source.reads)
    list(stream)
    assert sorted(source.reads) == sorted(tensors)


# -- hostile -------------------------------------------------------------------------------------------------------------
def change(key, tensor):
    return lambda tensors: tensors.__setitem__(f"block.lin.{key}", tensor(tensors.get(f"block.lin.{key}")))


def drop(key):
    return lambda tensors: tensors.pop(f"block.lin.{key}")


def mark(text):
    return change("comfy_quant", lambda _: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone())


def nans(t):
    return t.float().fill_(torch.nan).to(t.dtype)


HOSTILE = {
    "no weight": ("nvfp4", drop("weight"), "marks a layer whose weight is absent"),
    "no scale": ("nvfp4", drop("weight_scale"), "'block.lin.weight_scale' is absent"),
    "no tensor scale": ("nvfp4", drop("weight_scale_2"), "'block.lin.weight_scale_2' is absent"),
    "weight of floats": ("nvfp4", change("weight", lambda t: t.float()), "'block.lin.weight' wants uint8"),
    "weight of one dimension": ("int8", change("weight", lambda t: t[0]), "'block.lin.weight' wants 2 dimensions"),
    "empty weight": ("int8", change("weight", lambda t: t[:0]), "none of them empty"),
    "odd columns": ("nvfp4", change("weight", lambda t: t[:, :-3].contiguous()), "whole blocks of 16"),
    "odd mx columns": ("mxfp8", change("weight", lambda t: t[:, :-3].contiguous()), "whole blocks of 32"),
    "odd svdquant columns": ("svdquant_w4a4", change("weight", lambda t: t[:, :-3].contiguous()), "whole blocks of 64"),
    "odd awq columns": ("awq_w4a16", change("weight", lambda t: t[:, :-3].contiguous()), "whole blocks of 64"),
    "scale of another shape": ("nvfp4", change("weight_scale", lambda t: t[:64].contiguous()), r"wants \[128, 16\]"),
    "scale transposed": ("awq_w4a16", change("weight_scale", lambda t: t.T.contiguous()), "'block.lin.weight_scale' wants"),
    "scale in float64": ("int8", change("weight_scale", lambda t: t.double()), "wants float32"),
    "scale of NaN": ("int8", change("weight_scale", nans), "'block.lin.weight_scale' holds NaN"),
    "e4m3 scale of NaN": ("nvfp4", change("weight_scale", nans), "'block.lin.weight_scale' holds NaN"),
    "infinite tensor scale": ("nvfp4", change("weight_scale_2", lambda t: t / 0), "holds NaN or infinity"),
    "e8m0 scale of NaN": ("mxfp8", change("weight_scale", lambda t: (t.view(torch.uint8) * 0 + 255)), "no NaN"),
    "float8 weight of NaN": ("fp8", change("weight", nans), "'block.lin.weight' holds NaN"),
    "two scales": ("fp8", change("weight_scale", lambda t: torch.ones(2)), "'block.lin.weight_scale' wants"),
    "long bias": ("int8", change("bias", lambda t: torch.ones(N + 1)), "'block.lin.bias' wants"),
    "short bias": ("nvfp4", change("bias", lambda t: t[:16]), "'block.lin.bias' wants"),
    "bias of integers": ("int8", change("bias", lambda t: t.int()), "'block.lin.bias' wants"),
    "zero smoothing": ("svdquant_w4a4", change("smooth_factor", lambda t: t * 0), "no zero"),
    "zero input factor": ("nvfp4", change("pre_quant_scale", lambda _: torch.zeros(K)), "no zero"),
    "ranks that differ": ("svdquant_w4a4", change("proj_up", lambda t: t[:, :3].contiguous()), "'block.lin.proj_up' wants"),
    "no branch": ("svdquant_w4a4", drop("proj_down"), "'block.lin.proj_down' is absent"),
    "odd tiles": ("svdquant_w4a4", change("weight", lambda t: t.view(4, 4, 32, -1)), "tiles"),
    "zeros of another dtype": ("awq_w4a16", change("weight_zeros", lambda t: t.float()), "'block.lin.weight_zeros' wants"),
    "unknown format": ("int8", mark('{"format": "int9"}'), "is in the format 'int9'; readable: "),
    "format of a number": ("int8", mark('{"format": 8}'), "wants an object with 'format'"),
    "a list": ("int8", mark("[1]"), "wanted a JSON object"),
    "no JSON": ("int8", mark("{format"), "'block.lin.comfy_quant'"),
    "deep JSON": ("int8", mark("[" * 50000), "'block.lin.comfy_quant'"),
    "a key twice": ("int8", mark('{"format": "nvfp4", "format": "int8_tensorwise"}'), "appears twice"),
    "no UTF-8": ("int8", change("comfy_quant", lambda t: torch.full((9,), 255, dtype=torch.uint8)), "comfy_quant"),
    "long mark": ("int8", change("comfy_quant", lambda t: torch.zeros(1 << 17, dtype=torch.uint8)), "bytes of JSON"),
    "mark of floats": ("int8", change("comfy_quant", lambda t: t.float()), "bytes of JSON"),
    "rotation of 3": ("convrot_w4a4", mark('{"format": "convrot_w4a4", "convrot_groupsize": 3}'), "convrot_groupsize"),
    "rotation of true": ("convrot_w4a4", mark('{"format": "convrot_w4a4", "convrot_groupsize": true}'), "convrot_groupsize"),
    "rotation beyond K": ("convrot_w4a4", mark('{"format": "convrot_w4a4", "convrot_groupsize": 4096}'), "divisible"),
    "another basis": ("svdquant_w4a4", mark('{"format": "svdquant_w4a4", "lowrank_branch_input_basis": "x"}'), "basis"),
    "another group": ("awq_w4a16", mark('{"format": "awq_w4a16", "group_size": 128}'), "group_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_name_the_tensor(case, dict_source):
    name, spoil, message = HOSTILE[case]
    tensors = file_of(name)
    spoil(tensors)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        parts_of(dict_source, tensors)
    assert "block.lin" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_hostile_headers(dict_source):
    tensors = file_of("int8")
    for text in (
        "{",
        "[]",
        '{"layers": []}',
        '{"layers": {"block.lin": 3}}',
        '{"layers": {"nowhere": {"format": "nvfp4"}}}',
    ):
        with pytest.raises(BadCheckpoint):
            parts_of(dict_source, tensors, {"_quantization_metadata": text})
    with pytest.raises(BadCheckpoint, match="says int8_tensorwise, the header says nvfp4"):
        text = json.dumps({"layers": {"block.lin": {"format": "nvfp4"}}})
        parts_of(dict_source, tensors, {"_quantization_metadata": text})
    tensors["scaled_fp8"], tensors["x.scale_weight"] = torch.zeros(0), torch.ones(())
    with pytest.raises(BadCheckpoint, match=r"'x\.scale_weight' belongs to a float8 weight"):
        parts_of(dict_source, tensors)


def test_mutated_marks_and_shapes_raise_nothing_else(dict_source):
    """Two thousand random changes of good files: parts, or a BadCheckpoint."""
    generator = torch.Generator().manual_seed(1)
    files = {name: file_of(name) for name in FORMATS}

    def draw(n):
        return int(torch.randint(max(n, 1), (), generator=generator))

    refused = 0
    for i in range(2000):
        tensors = dict(files[list(FORMATS)[i % len(FORMATS)]])
        for _ in range(1 + draw(2)):
            key = list(tensors)[draw(len(tensors))]
            t = tensors[key]
            action = draw(6)
            if action == 0:
                del tensors[key]
            elif action == 1 and t.ndim:
                tensors[key] = t[: draw(t.shape[0] + 1)].contiguous()
            elif action == 2:
                tensors[key] = t.reshape(-1)
            elif action == 3:
                tensors[key] = t.view(torch.uint8) if t.ndim else t.half()
            elif action == 4 and t.ndim and t.numel():
                raw = t.clone().view(torch.uint8).flatten()
                raw[draw(len(raw))] = draw(256)
                tensors[key] = raw.view(t.dtype).reshape(t.shape)
            else:
                tensors[f"{key}.{'comfy_quant' if draw(2) else 'weight'}"] = t
            if not tensors:
                break
        source = dict_source(tensors)
        try:
            list(importers["comfy"].parts(source))
        except BadCheckpoint:
            refused += 1
    assert 400 < refused < 2000


def test_saved_by_safetensors_itself(tmp_path):
    """Files of the usual writer are read as well as our own."""
    save_file(file_of("mxfp8"), tmp_path / "x.safetensors")
    found = [p for p in read(tmp_path) if isinstance(p, Layer)]
    assert equal(found[0], replace(found[0])) and found[0].layout.weight == "mxfp8_e4m3"
