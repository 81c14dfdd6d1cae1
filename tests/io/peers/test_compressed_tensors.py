"""compressed-tensors against the library itself: what it compresses is read, what qgen writes it decompresses, to the same values."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Model, Plain, exporters, importers
from qgen.io.peers.compressed_tensors import _matches
from qgen.io.peers.floats import dequantized
from qgen.io.peers.source import open_source
from qgen.nn.packed import Layout

N, K = 96, 256
INTEGER = {"type": "int", "symmetric": True}


@pytest.fixture(scope="module")
def library():
    pytest.importorskip("compressed_tensors", reason="the truth is the library itself")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    def compress(kind, weights, tensors, act=None):
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=act, format=kind)
        return BaseCompressor.get_value_from_registry(kind).compress(tensors, scheme), scheme

    def decompress(kind, scheme, tensors):
        return BaseCompressor.get_value_from_registry(kind).decompress(dict(tensors), scheme)["weight"]

    return compress, decompress


def parts(source):
    assert importers["compressed-tensors"].recognizes(source)
    return list(importers["compressed-tensors"].parts(source))


def config_of(kind, scheme):
    group = json.loads(scheme.model_dump_json())
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": kind,
            "config_groups": {"group_0": group},
        }
    }


PACKED = [
    (bits, block, symmetric, dtype)
    for bits, block, symmetric, dtype in [
        *((bits, 64, True, torch.bfloat16) for bits in range(2, 9)),
        (4, 128, True, torch.float16),
        (4, 32, False, torch.bfloat16),
        (4, 128, False, torch.float16),
        (3, 64, False, torch.float32),
        (8, None, False, torch.bfloat16),
        (4, None, True, torch.bfloat16),
    ]
]


@pytest.mark.parametrize(("bits", "block", "symmetric", "dtype"), PACKED, ids=lambda v: str(v).removeprefix("torch."))
def test_pack_quantized(bits, block, symmetric, dtype, library, dict_source):
    compress, decompress = library
    n = k = 1024
    groups = k // (block or k)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    tensors = {
        "weight": torch.randn(n, k).to(dtype),
        "weight_scale": (torch.rand(n, groups) * 0.2 + 0.05).to(dtype),
        "weight_zero_point": torch.zeros(n, groups, dtype=torch.int8)
        if symmetric
        else torch.randint(low, high + 1, (n, groups), dtype=torch.int8),
    }
    tensors["weight"][0, 0], tensors["weight"][0, 1] = -1e3, 1e3  # the outermost codes
    strategy = {"strategy": "group", "group_size": block} if block else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    packed, scheme = compress("pack-quantized", weights, tensors)
    bias = torch.randn(n).to(dtype)
    named = {f"a.b.{leaf}": t for leaf, t in packed.items()} | {"a.b.bias": bias, "a.norm.weight": torch.ones(4)}
    found = parts(dict_source(named, config=config_of("pack-quantized", scheme)))
    layer = next(part for part in found if isinstance(part, Layer))
    assert [type(part) for part in found if part is not layer] == [Plain] and torch.equal(layer.slots["bias"], bias)
    assert (layer.path, layer.shape, layer.layout.act) == ("a.b", (n, k), "")
    kind = ("int" if symmetric else "uint") + str(bits) + ("" if symmetric else "z")
    suffix = {torch.bfloat16: "", torch.float16: "_f16", torch.float32: "_f32"}[dtype]
    assert layer.layout.weight == f"{kind}_{f'g{block}{suffix}' if block else 'row'}"
    values = dequantized(layer)[0]
    assert torch.equal(
        values.to(dtype), decompress("pack-quantized", scheme, packed)
    )  # the library multiplies in `dtype`
    assert (
        parts(dict_source(named))[0].layout.weight == layer.layout.weight
    )  # names and shapes tell it without a config


def test_columns_in_another_order(library, dict_source):
    compress, _ = library
    scales = torch.rand(N, 4) * 0.2 + 0.05
    index = torch.randperm(K) % 4
    ordered = index.argsort(stable=True)
    weight = torch.randn(N, K)
    packed, _ = compress(
        "pack-quantized",
        {"num_bits": 4, **INTEGER, "strategy": "group", "group_size": 64},
        {"weight": weight[:, ordered], "weight_scale": scales},
    )
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = unpack_from_int32(packed["weight_packed"], 4, (N, K))[:, ordered.argsort()]
    named = {
        "x.weight_packed": pack_to_int32(codes, 4),
        "x.weight_scale": scales,
        "x.weight_shape": torch.tensor([N, K]),
        "x.weight_g_idx": index.int(),
    }
    (part,) = parts(dict_source(named))
    assert isinstance(part, Plain) and part.note == "dequantized: columns in another order"
    assert torch.equal(part.tensor, codes * scales[:, index])
    named["x.weight_g_idx"] = (torch.arange(K) // 64).int()
    assert isinstance(parts(dict_source(named))[0], Layer)


@pytest.mark.parametrize("dynamic", (True, False), ids=("dynamic", "static"))
def test_int_quantized(dynamic, library, dict_source):
    compress, decompress = library
    tensors = {"weight": torch.randn(N, K), "weight_scale": torch.rand(N, 1) * 0.02 + 0.01}
    act = {"num_bits": 8, **INTEGER, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    packed, scheme = compress("int-quantized", {"num_bits": 8, **INTEGER, "strategy": "channel"}, tensors, act)
    named = {f"x.{leaf}": t for leaf, t in packed.items()} | ({} if dynamic else {"x.input_scale": torch.tensor([0.5])})
    (layer,) = parts(dict_source(named, config=config_of("int-quantized", scheme)))
    assert (layer.layout.weight, layer.layout.act) == ("int8_row", "int8_row")
    assert dynamic or layer.slots["act_scale"].tolist() == [0.5]
    assert torch.equal(dequantized(layer)[0], decompress("int-quantized", scheme, packed))


@pytest.mark.parametrize("scale", (torch.rand(N, 1) + 0.1, torch.rand(1) + 0.1), ids=("rows", "tensor"))
def test_float_quantized(scale, library, dict_source):
    compress, decompress = library
    strategy = "channel" if scale.ndim == 2 else "tensor"
    act = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    packed, scheme = compress("float-quantized", weights, {"weight": torch.randn(N, K), "weight_scale": scale}, act)
    (layer,) = parts(
        dict_source({f"x.{leaf}": t for leaf, t in packed.items()}, config=config_of("float-quantized", scheme))
    )
    assert (layer.layout.weight, layer.layout.act) == ("fp8_e4m3_row", "fp8_e4m3_row")
    assert torch.equal(dequantized(layer)[0], decompress("float-quantized", scheme, packed))


def test_float_tiles_are_dequantized(library, dict_source):
    compress, decompress = library
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [32, 64]}
    packed, scheme = compress(
        "float-quantized", weights, {"weight": torch.randn(N, K), "weight_scale": torch.rand(3, 4) + 0.1}
    )
    (part,) = parts(
        dict_source({f"x.{leaf}": t for leaf, t in packed.items()}, config=config_of("float-quantized", scheme))
    )
    assert isinstance(part, Plain) and part.note == "dequantized: float8 in tiles of 32 x 64"
    assert torch.equal(part.tensor, decompress("float-quantized", scheme, packed))


def test_nvfp4(library, dict_source):
    """The library divides each scale by the global one, qgen multiplies by the reciprocal: one rounding of float32 apart."""
    compress, decompress = library
    weight = torch.randn(1024, 1024)
    shared = 448 * 6 / weight.abs().amax()
    scales = (weight.view(1024, -1, 16).abs().amax(-1) / 6 * shared).to(torch.float8_e4m3fn).float()
    weights = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
    tensors = {"weight": weight, "weight_scale": scales, "weight_global_scale": shared.reshape(1)}
    packed, scheme = compress("nvfp4-pack-quantized", weights, tensors, {**weights, "dynamic": "local"})
    named = {f"x.{leaf}": t for leaf, t in packed.items()} | {"x.input_global_scale": torch.ones(1)}
    (layer,) = parts(dict_source(named, config=config_of("nvfp4-pack-quantized", scheme)))
    assert (layer.layout.weight, layer.layout.act) == ("nvfp4", "nvfp4_dynamic")
    assert torch.equal(layer.slots["codes"], packed["weight_packed"])
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    grid = unpack_fp4_from_uint8(packed["weight_packed"], 1024, 1024, torch.float32).view(1024, -1, 16)
    want = (grid * (scales / shared)[..., None]).flatten(1)
    values = dequantized(layer)[0]
    assert ((values - want).abs() <= 2 * torch.finfo(torch.float32).eps * want.abs()).all()
    assert (values.bfloat16() != decompress("nvfp4-pack-quantized", scheme, packed).bfloat16()).float().mean() < 1e-3


# -- out ----------------------------------------------------------------------------------------------------------------


def layer(path, name, act="", **more):
    weight = torch.randn(N, K)
    q = formats.get(name).quantize(weight)
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero, **more}
    slots = {slot: t for slot, t in slots.items() if t is not None}
    rank = more["down"].shape[0] if "down" in more else 0
    return Layer(
        path, (N, K), Layout(name, act, rank, slots=tuple(s for s in slots if s not in ("codes", "scales"))), slots
    )


KEPT = [
    ("int4_g128", ""), ("int4_g64", ""), ("int4_g32_f16", ""), ("int3_g64", ""), ("int8_row", "int8_row"), ("int8_row", ""),
    ("int4_row", ""), ("uint4z_g128", ""), ("uint4z_g64_f16", ""), ("uint8z_row", ""), ("fp8_e4m3_row", "fp8_e4m3_row"), ("nvfp4", ""),
    ("mxfp4", ""),
]  # fmt: skip


def test_the_library_reads_what_is_written(library, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    made = [layer(f"l.{i}", *kind, bias=torch.randn(N).bfloat16()) for i, kind in enumerate(KEPT)]
    plain = Plain("norm.weight", torch.ones(3))
    about = Model("X", {"_class_name": "X", "quantization_config": {"quant_method": "old"}})
    assert exporters["compressed-tensors"].write([*made, plain], tmp_path / "m", about=about) == []
    text = json.loads((tmp_path / "m" / "config.json").read_text())
    assert text["_class_name"] == "X" and text["quantization_config"]["format"] == "mixed-precision"
    config = QuantizationConfig.model_validate(text["quantization_config"])
    state = load_file(tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(state["norm.weight"], plain.tensor)
    for part in made:
        (scheme,) = (group for group in config.config_groups.values() if part.path in group.targets)
        mine = {name.removeprefix(part.path + "."): t for name, t in state.items() if name.startswith(part.path + ".")}
        assert torch.equal(mine.pop("bias"), part.slots["bias"])
        values = library[1](scheme.format, scheme, mine)
        assert torch.equal(values, dequantized(part)[0].to(values.dtype)), part.layout.weight
        assert (scheme.input_activations is not None) == bool(part.layout.act)
    again = {part.path: part for part in parts(open_source(tmp_path / "m")) if isinstance(part, Layer)}
    for part in made:
        back = again[part.path]
        assert (back.layout.weight, back.layout.act) == (part.layout.weight, part.layout.act)
        for slot, tensor in part.slots.items():
            if slot != "global_scale":  # a reciprocal of a reciprocal
                assert torch.equal(back.slots[slot], tensor)
            assert torch.allclose(back.slots[slot].float(), tensor.float(), rtol=3e-7, atol=0)


def test_one_file_says_what_it_is(tmp_path):
    made = [layer("x", "int4_g64", "int4_g64")]
    notes = exporters["compressed-tensors"].write(made, tmp_path / "a.safetensors", about=Model())
    assert notes == ["x: activations are no longer rounded to int4_g64"]
    (back,) = parts(open_source(tmp_path / "a.safetensors"))
    assert torch.equal(back.slots["codes"], made[0].slots["codes"]) and back.layout.weight == "int4_g64"


def test_what_it_cannot_hold_is_written_as_floats(tmp_path):
    made = [
        layer("lora", "int4_g64", down=torch.randn(4, K), up=torch.randn(N, 4), smooth=torch.rand(K) + 0.5),
        layer("offset", "uint4_g64"),
        layer("table", "nf4_g64"),
        layer("nv", "nvfp4_row"),
    ]
    notes = exporters["compressed-tensors"].write(made, tmp_path / "m", about=Model())
    assert len(notes) == 4 and all(": dequantized: compressed-tensors holds no " in note for note in notes)
    state = load_file(tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    for part in made:
        assert torch.equal(state[f"{part.path}.weight"], dequantized(part)[0].bfloat16())
    assert not (tmp_path / "m" / "config.json").exists()


# -- strangers ----------------------------------------------------------------------------------------------------------


def good():
    return {
        "x.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "x.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
        "x.weight_shape": torch.tensor([8, 64]),
    }


WRONG = {
    "a huge shape": ({"x.weight_shape": torch.tensor([2**40, 2**40])}, "x.weight_shape"),
    "a negative shape": ({"x.weight_shape": torch.tensor([-8, 64])}, "x.weight_shape"),
    "three sizes": ({"x.weight_shape": torch.tensor([8, 64, 1])}, "x.weight_shape"),
    "another shape": ({"x.weight_shape": torch.tensor([8, 65 * 64])}, "x.weight_packed"),
    "no scales": ({"x.weight_scale": torch.ones(8, 0)}, "x.weight_scale"),
    "uneven scales": ({"x.weight_scale": torch.ones(8, 5)}, "x.weight_scale"),
    "scales of other rows": ({"x.weight_scale": torch.ones(4, 1)}, "x.weight_scale"),
    "whole scales": ({"x.weight_scale": torch.ones(8, 1, dtype=torch.int32)}, "x.weight_scale"),
    "NaN scales": ({"x.weight_scale": torch.full((8, 1), torch.nan)}, "x.weight_scale"),
    "zero points of another size": (
        {"x.weight_zero_point": torch.zeros(2, 1, dtype=torch.int32)},
        "x.weight_zero_point",
    ),
    "groups beyond the end": ({"x.weight_g_idx": torch.full((64,), 7, dtype=torch.int32)}, "x.weight_g_idx"),
    "codes as floats": ({"x.weight_packed": torch.zeros(8, 8)}, "x.weight_packed"),
    "a bias of another size": ({"x.bias": torch.zeros(9)}, "x.bias"),
    "fp4 without whole blocks": ({"x.weight_packed": torch.zeros(8, 9, dtype=torch.uint8)}, "x.weight_packed"),
    "fp4 scales of another size": (
        {"x.weight_packed": torch.zeros(8, 32, dtype=torch.uint8), "x.weight_global_scale": torch.ones(1)},
        "x.weight_scale",
    ),
    "no weight at all": ({"x.weight_packed": None}, "x.weight"),
}


@pytest.mark.parametrize("why", WRONG)
def test_strangers(why, dict_source):
    changed, name = WRONG[why]
    tensors = {key: t for key, t in (good() | changed).items() if t is not None}
    source = dict_source(tensors, config={"quantization_config": {"quant_method": "compressed-tensors"}})
    with pytest.raises(BadCheckpoint, match=f"memory.safetensors: '{name}'"):
        parts(source)


@pytest.mark.parametrize(
    "config",
    [
        {"config_groups": 3},
        {"config_groups": {"a": 1}},
        {"config_groups": {"a": {"targets": 3, "weights": 3, "input_activations": [1]}}},
    ],
)
def test_damaged_configs_say_nothing(config, dict_source):
    source = dict_source(good(), config={"quantization_config": {"quant_method": "compressed-tensors", **config}})
    assert [part.layout.weight for part in parts(source)] == ["int4_row"]


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("a.b", "a.b.c", True), ("a.b$", "a.b.c", False), (".*b", "a.b.c", True), (".*b$", "a.b", True), (r".*\.q_proj$", "m.q_proj", True),
        (r".*\.q_proj$", "m.xq_proj", False), ("a.*b.*c$", "axbxc", True), ("a.*b.*c$", "axcxb", False),
        ("(a+)+$", "a", False), ("ab.*b$", "ab", False),
    ],
)  # fmt: skip
def test_patterns(pattern, path, fits):
    assert _matches(pattern, path) == fits
