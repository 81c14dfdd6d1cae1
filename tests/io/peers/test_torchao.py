"""torchao against the library: its tensors, flattened by its own safetensors support, mean the same here bit for bit."""

import json

import pytest
import torch

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Plain, importers
from qgen.io.peers.floats import dequantized

N, K = 96, 256


@pytest.fixture(scope="module")
def library():
    """The library's classes by name, and its function that flattens."""
    pytest.importorskip("torchao", reason="the truth is the library itself")
    from torchao import quantization as q
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict as flatten
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs as Float8Kwargs
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs as Int8Kwargs

    found = [
        MXTensor,
        NVFP4Tensor,
        MappingType,
        Float8Kwargs,
        Int8Kwargs,
        q.Float8Tensor,
        q.Int8Tensor,
        q.IntxUnpackedToInt8Tensor,
    ]
    return {kind.__name__: kind for kind in [*found, q.PerRow, q.PerTensor, flatten]}


def weight():
    return torch.randn(1024, 1024)


MADE = {
    "int8": (lambda t: t["Int8Tensor"].from_hp(weight(), t["PerRow"]()), "int8_row", ""),
    "int8 from bfloat16": (lambda t: t["Int8Tensor"].from_hp(weight().bfloat16(), t["PerRow"]()), "int8_row", ""),
    "int8 of one scale": (lambda t: t["Int8Tensor"].from_hp(weight(), t["PerTensor"]()), "int8_row", ""),
    "int8 with zero points": (
        lambda t: t["Int8Tensor"].from_hp(weight() + 1, t["PerRow"](), mapping_type=t["MappingType"].ASYMMETRIC), "uint8z_row", "",
    ),
    "int8 x int8": (
        lambda t: t["Int8Tensor"].from_hp(
            weight(), t["PerRow"](), act_quant_kwargs=t["QuantizeTensorToInt8Kwargs"](granularity=t["PerRow"]())
        ),
        "int8_row", "int8_row",
    ),
    "float8 rows": (lambda t: t["Float8Tensor"].from_hp(weight(), granularity=t["PerRow"]()), "fp8_e4m3_row", ""),
    "float8 of one scale": (lambda t: t["Float8Tensor"].from_hp(weight(), granularity=t["PerTensor"]()), "fp8_e4m3_row", ""),
    "float8 x float8": (
        lambda t: t["Float8Tensor"].from_hp(
            weight(), granularity=t["PerRow"](), act_quant_kwargs=t["QuantizeTensorToFloat8Kwargs"](granularity=t["PerRow"]())
        ),
        "fp8_e4m3_row", "fp8_e4m3_row",
    ),
    "nvfp4": (lambda t: t["NVFP4Tensor"].to_nvfp4(weight(), per_tensor_scale=torch.tensor(0.0017)), "nvfp4", ""),
    "nvfp4 swizzled": (lambda t: t["NVFP4Tensor"].to_nvfp4(weight(), is_swizzled_scales=True), "nvfp4", ""),
    "mxfp4": (lambda t: t["MXTensor"].to_mx(weight(), torch.float4_e2m1fn_x2, 32), "mxfp4", ""),
    "mxfp8": (lambda t: t["MXTensor"].to_mx(weight(), torch.float8_e4m3fn, 32), "mxfp8_e4m3", ""),
    "mxfp8 e5m2": (lambda t: t["MXTensor"].to_mx(weight(), torch.float8_e5m2, 32), "mxfp8_e5m2", ""),
    "int4 unpacked": (
        lambda t: t["IntxUnpackedToInt8Tensor"].from_hp(weight(), [1, 64], torch.int4, mapping_type=t["MappingType"].SYMMETRIC),
        "int4_g64_f32", "",
    ),
    "int3 with zero points": (
        lambda t: t["IntxUnpackedToInt8Tensor"].from_hp(weight(), [1, 32], torch.int3, mapping_type=t["MappingType"].ASYMMETRIC),
        "uint3z_g32_f32", "",
    ),
}  # fmt: skip


def parts(source):
    assert importers["torchao"].recognizes(source)
    return list(importers["torchao"].parts(source))


@pytest.mark.parametrize("what", MADE)
def test_values(what, library, dict_source):
    make, name, act = MADE[what]
    tensor, bias = make(library), torch.randn(1024)
    flat, texts = library["flatten_tensor_state_dict"](
        {"a.b.weight": tensor, "a.b.bias": bias, "n.weight": torch.ones(3)}
    )
    layer, plain = parts(dict_source(flat, texts))
    assert (layer.path, layer.layout.weight, layer.layout.act) == ("a.b", name, act) and plain.name == "n.weight"
    assert layer.dtype == tensor.dtype and torch.equal(layer.slots["bias"], bias)
    want = tensor.dequantize()
    assert torch.equal(dequantized(layer)[0].to(want.dtype), want)
    empty = layer.layout.empty(1024, 1024, torch.float32)
    assert {s: (t.shape, t.dtype) for s, t in empty.items()} == {s: (t.shape, t.dtype) for s, t in layer.slots.items()}


def int4(symmetric, before=None, n=N, k=K):
    """Int4Tensor as its kernels' package makes it: codes -8 … 7, even columns in low nibbles, w = q · scale + zero."""
    codes = torch.randint(-8, 8, (n, k))
    scale, zero = (torch.rand(k // 64, n) + 0.1).bfloat16(), torch.randn(k // 64, n).bfloat16() * (not symmetric)
    packed = ((codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)).to(torch.uint8).view(torch.int8)
    index = torch.arange(k) // 64
    values = codes.float() * scale.float()[index].T + zero.float()[index].T
    data = {"block_size": [1, 64], "shape": [n, k], "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    tensors = {"a.b._weight_qdata": packed, "a.b._weight_scale": scale, "a.b._weight_zero_point": zero}
    if before is not None:
        tensors["a.b._weight_act_pre_scale"] = before
    return tensors, described("Int4Tensor", data), values


def described(kind, data):
    text = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": []})
    return {"a.b.weight": text, "tensor_names": json.dumps(["a.b.weight"])}


@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "zeros"))
def test_int4(symmetric, dict_source):
    tensors, texts, values = int4(symmetric, n=1024, k=1024)
    (layer,) = parts(dict_source(tensors, texts))
    assert layer.layout.weight == ("int4_g64" if symmetric else "int4o_g64") and layer.dtype == torch.bfloat16
    assert torch.equal(dequantized(layer)[0], values)


def test_inputs_scaled_first_are_folded_in(dict_source):
    before = torch.rand(K) + 0.5
    tensors, texts, values = int4(False, before)
    (part,) = parts(dict_source(tensors, texts))
    assert isinstance(part, Plain) and "act_pre_scale" in part.note and torch.equal(part.tensor, values * before)


def test_layouts_of_one_device_are_refused_by_name(dict_source):
    tensors, _, _ = int4(True)
    with pytest.raises(BadCheckpoint, match=r"'a\.b\.weight' is torchao's Int4TilePackedTo4dTensor"):
        parts(dict_source(tensors, described("Int4TilePackedTo4dTensor", {})))


INT4 = {"block_size": [1, 64]}
NV = {"block_size": 16}
WRONG = {
    "no codes": ("Int4Tensor", INT4, {"qdata": None}, "qdata"),
    "no scales": ("Int4Tensor", INT4, {"scale": None}, "scale"),
    "no zero points": ("Int4Tensor", INT4, {"zero_point": None}, "zero_point"),
    "scales of another size": ("Int4Tensor", INT4, {"scale": torch.ones(4, N + 1)}, "scale"),
    "NaN scales": ("Int4Tensor", INT4, {"scale": torch.full((4, N), torch.nan)}, "scale"),
    "codes of three sizes": ("Int4Tensor", INT4, {"qdata": torch.zeros(N, K // 2, 1, dtype=torch.int8)}, "qdata"),
    "float codes": ("Int4Tensor", INT4, {"qdata": torch.zeros(N, K // 2)}, "qdata"),
    "blocks of 0": ("Int4Tensor", {"block_size": [1, 0]}, {}, "scale"),
    "blocks of no kind": ("Int4Tensor", {"block_size": "64"}, {}, "scale"),
    "other blocks": ("Int4Tensor", {"block_size": [1, 32]}, {}, "scale"),
    "no data": ("Int4Tensor", None, {}, "scale"),
    "int8 codes of another type": ("Int8Tensor", {}, {"qdata": torch.zeros(N, K, dtype=torch.int16)}, "qdata"),
    "uneven scales": ("Int8Tensor", {}, {"scale": torch.ones(N, 3)}, "scale"),
    "int8 scales of other rows": ("Int8Tensor", {}, {"scale": torch.ones(5, 1)}, "scale"),
    "intx of no width": (
        "IntxUnpackedToInt8Tensor",
        {"target_dtype": {"_type": "torch.dtype", "_data": "int9"}},
        {},
        "qdata",
    ),
    "codes beyond the width": (
        "IntxUnpackedToInt8Tensor",
        {"target_dtype": {"_type": "torch.dtype", "_data": "int2"}},
        {
            "qdata": torch.full((N, K), 5, dtype=torch.int8),
            "scale": torch.ones(N, 1),
            "zero_point": torch.zeros(N, 1, dtype=torch.int8),
        },
        "qdata",
    ),
    "a zero point of 1000": (
        "Int8Tensor",
        {},
        {
            "qdata": torch.zeros(N, K, dtype=torch.int8),
            "scale": torch.ones(N, 1),
            "zero_point": torch.full((N, 1), 1000, dtype=torch.int32),
        },
        "zero_point",
    ),
    "float8 in tiles": (
        "Float8Tensor",
        {},
        {"qdata": torch.zeros(N, K).to(torch.float8_e4m3fn), "scale": torch.ones(3, 4)},
        "scale",
    ),
    "nvfp4 blocks of 32": (
        "NVFP4Tensor",
        {"block_size": 32},
        {"qdata": torch.zeros(N, 128, dtype=torch.uint8)},
        "qdata",
    ),
    "nvfp4 scales of another size": ("NVFP4Tensor", NV, {"qdata": torch.zeros(N, 128, dtype=torch.uint8)}, "scale"),
    "swizzled scales of another size": (
        "NVFP4Tensor",
        NV | {"is_swizzled_scales": True},
        {"qdata": torch.zeros(N, 128, dtype=torch.uint8), "scale": torch.zeros(5).to(torch.float8_e4m3fn)},
        "scale",
    ),
    "MX of another element": ("MXTensor", {"block_size": 32, "elem_dtype": "fp6_e3m2"}, {}, "qdata"),
}


@pytest.mark.parametrize("why", WRONG)
def test_strangers(why, dict_source):
    kind, data, changed, name = WRONG[why]
    tensors = int4(False)[0] | {f"a.b._weight_{leaf}": t for leaf, t in changed.items()}
    tensors = {key: t for key, t in tensors.items() if t is not None}
    with pytest.raises(BadCheckpoint, match=f"memory.safetensors: 'a.b._weight_{name}'"):
        parts(dict_source(tensors, described(kind, data)))


@pytest.mark.parametrize("text", ["{", "[1]", "{" * 5000, '{"_type": 3}', '{"_type": "Tensor"}', "plain words"])
def test_texts_that_describe_nothing(text, dict_source):
    source = dict_source({"a.weight": torch.ones(2)}, {"a.weight": text, "tensor_names": "[]"})
    assert not importers["torchao"].recognizes(source)
