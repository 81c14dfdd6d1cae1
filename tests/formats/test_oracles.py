"""Codes, scales and values of whole formats against the libraries that other people quantize with, bit for bit, on a million values each.

Where a library rounds otherwise, the test says where: it counts those values, and checks that nothing else differs.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from qgen import formats
from qgen.formats import QTensor, packing
from qgen.formats.nf4_dq import DYNAMIC8, collect, spread


@pytest.fixture(scope="module")
def million():
    """(1024, 1024) float32: Gaussian rows of all sizes, with zeros, ties, constant and tiny blocks."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(11))
    x *= torch.logspace(-3, 3, 1024)[:, None]
    x[5], x[6, :64], x[7, :64] = 0, 0, -0.0
    x[8] = torch.arange(1024) / 64 - 8  # ties everywhere
    x[9], x[10, :32] = 3.0, 1e-30
    x[11, ::2] = -0.0
    x[12:20] = (torch.arange(1024) % 57 - 28) / 4  # every tie of e2m1
    return x


def codes_of(q):
    return formats.get(q.format).unpack(q.codes)


# -- bitsandbytes -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bnb(tmp_path_factory):
    pytest.importorskip("bitsandbytes", reason="the oracle is bitsandbytes")
    return pytest.importorskip("bitsandbytes.functional")


def unpacked(packed, shape):
    """bitsandbytes has the even column in the high nibble."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], -1).view(shape)


@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_nf4_equals_bitsandbytes(bnb, million, block):
    packed, state = bnb.quantize_4bit(million, blocksize=block, quant_type="nf4")
    q = formats.get(f"nf4_g{block}").quantize(million)
    assert torch.equal(codes_of(q), unpacked(packed, million.shape))
    assert torch.equal(q.scales.flatten(), state.absmax)
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


def test_fp4_of_bitsandbytes_but_for_the_sign_of_zero(bnb, million):
    packed, state = bnb.quantize_4bit(million, blocksize=64, quant_type="fp4")
    q = formats.get("bnb_fp4_g64").quantize(million)
    mine, theirs = codes_of(q), unpacked(packed, million.shape)
    other = mine != theirs
    assert set(zip(mine[other].tolist(), theirs[other].tolist(), strict=True)) <= {(0, 8), (8, 0)}
    assert torch.equal(q.scales.flatten(), state.absmax)
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


def test_the_dynamic_map_is_that_of_bitsandbytes(bnb):
    assert torch.equal(bnb.create_dynamic_map(), torch.tensor(DYNAMIC8.values))


@pytest.mark.parametrize("shape", [(1024, 1024), (37, 64 * 300), (33, 3072), (3, 64)], ids=str)
def test_double_quantization_of_bitsandbytes(bnb, million, shape):
    """Its CPU kernel for float32 misses the nearest of the 256 values now and then; its general path, taken for float64, does not."""
    x = million.flatten()[: shape[0] * shape[1]].view(shape) / million.abs().amax()
    fmt = formats.get("nf4_g64_dq")
    q, plain = fmt.quantize(x), formats.get("nf4_g64").quantize(x)
    offset = plain.scales.mean()
    centred = torch.nn.functional.pad(plain.scales.flatten() - offset, (0, -plain.scales.numel() % 256))
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), bnb.create_dynamic_map(), 256)
    assert torch.equal(q.scales.flatten(), codes[: q.scales.numel()])
    mine = collect(q.global_scale, shape[1] // 64)
    assert torch.equal(mine[0], offset) and torch.equal(mine[1], nested)

    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = QTensor(
        packing.pack(unpacked(packed, shape), 4),
        state.absmax.view(shape[0], -1),
        spread(state.offset, state.state2.absmax, torch.Size([shape[0], shape[1] // 64])),
        None,
        fmt.name,
    )
    assert torch.equal(theirs.dequantize(), bnb.dequantize_4bit(packed, state))
    assert (q.scales.flatten() != state.absmax).float().mean() < 5e-3
    mine, other = ((y - x).square().mean() for y in (q.dequantize(), theirs.dequantize()))
    assert mine <= other * 1.0001  # rounding with the stored absmax is no worse


# -- comfy-kitchen ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def comfy():
    pytest.importorskip("comfy_kitchen", reason="the oracle is comfy-kitchen")
    from comfy_kitchen.backends.eager import quantization

    return quantization


def linear_scales(blocked, rows, groups):
    """Undoes the tiled order in which comfy-kitchen returns block scales."""
    from comfy_kitchen.float_utils import from_blocked

    return from_blocked(blocked.view(torch.uint8), num_rows=rows, num_cols=groups)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_row", "nvfp4_46", "nvfp4_46_row"])
def test_nvfp4_equals_comfy_kitchen(comfy, million, name):
    """A row at a time its tensor scale is our scale of the row. Scales of 4/6 are our choice; its codes for them are ours."""
    fmt = formats.get(name)
    q = fmt.quantize(million)
    parts = [slice(None)] if fmt.global_scale == "tensor" else [slice(n, n + 1) for n in range(0, 1024, 31)]
    for part in parts:
        shared = q.global_scale if fmt.global_scale == "tensor" else q.global_scale[part].squeeze()
        if "46" not in name:
            codes, blocked = comfy.quantize_nvfp4(million[part], shared, hi_first=False)
            assert torch.equal(q.codes[part], codes)
            assert torch.equal(q.scales[part].view(torch.uint8), linear_scales(blocked, len(codes), 64))
        else:
            from comfy_kitchen.float_utils import to_blocked

            codes, blocked = q.codes[part], to_blocked(q.scales[part], flatten=False)
        values = comfy.dequantize_nvfp4(codes, shared, blocked, torch.float32, hi_first=False)
        assert torch.equal(q.dequantize()[part], values[: len(codes)])


def test_mxfp8_equals_comfy_kitchen(comfy, million):
    """It takes the ceiling of a float32 logarithm; on this data no logarithm is so near to a whole number that it is rounded to it."""
    q = formats.get("mxfp8_e4m3_rceil").quantize(million)
    codes, blocked = comfy.quantize_mxfp8(million)
    assert torch.equal(q.scales, linear_scales(blocked, 1024, 32))
    filled = formats.get("mxfp4").blocks(million).any(-1)[..., None].expand(-1, -1, 32).flatten(1)
    assert torch.equal(q.codes[filled], codes.view(torch.uint8)[filled])  # in blocks of zeros it drops the sign of -0
    assert torch.equal(q.dequantize(), comfy.dequantize_mxfp8(codes, blocked, torch.float32))


@pytest.mark.parametrize(
    "name, function", [("int8_row", "quantize_int8_rowwise"), ("int8_tensor", "quantize_int8_tensorwise")]
)
def test_int8_equals_comfy_kitchen(comfy, million, name, function):
    q = formats.get(name).quantize(million)
    codes, scale = getattr(comfy, function)(million)
    nonzero = million.abs().amax(-1) > 0
    assert torch.equal(q.codes.view(torch.int8), codes)
    assert torch.equal(q.scales[nonzero].flatten(), scale.flatten().expand(1024)[nonzero])


# -- torchao ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mx():
    pytest.importorskip("torchao", reason="the oracle is torchao")
    return pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")


ELEMENTS = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp6_e2m3": "fp6_e2m3", "mxfp6_e3m2": "fp6_e3m2",
            "mxfp4": torch.float4_e2m1fn_x2}  # fmt: skip


@pytest.mark.parametrize("mode", ["floor", "even", "rceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_equals_torchao(mx, million, name, mode):
    """torchao takes 2^-126 for the least scale where e8m0 says 2^-127: here in blocks of zeros alone, whose codes are zeros anyway."""
    fmt = formats.get(name if mode == "floor" else f"{name}_{mode}")
    q = fmt.quantize(million)
    scales, codes = mx.to_mx(million, ELEMENTS[name], 32, mx.ScaleCalculationMode[mode.upper()])
    assert torch.equal(q.scales, scales.view(torch.uint8))
    codes = codes.view(torch.uint8)
    assert torch.equal(q.codes if fmt.bits in (4, 8) else codes_of(q), codes)
    values = mx.to_dtype(
        codes.view(ELEMENTS[name]) if fmt.bits == 8 else codes, scales, ELEMENTS[name], 32, torch.float32
    )
    assert torch.equal(q.dequantize(), values.view(1024, 1024))


def test_nvfp4_of_torchao_but_for_tiny_blocks_and_reciprocals(mx, million):
    """torchao multiplies by (1 / global) / scale, in that order, and takes at least 2^-6 for a block's scale, the smallest normal e4m3."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    q = formats.get("nvfp4").quantize(million)
    scales, codes = nv.nvfp4_quantize(million, per_tensor_scale=q.global_scale)
    normal = q.scales.float() >= 2.0**-6
    assert normal.float().mean() > 0.5 and torch.equal(q.scales.float()[normal], scales.float().view(1024, 64)[normal])
    other = (codes_of(q) != packing.unpack(codes.view(torch.uint8), 4)).unflatten(-1, (64, 16))[normal]
    assert other.float().mean() < 1e-4


def test_int4_of_torchao(mx, million):
    """Its codes u - 8 are those of `uint4` up to the last bit of scale and zero; the values of its codes are exactly `int4o`'s."""
    from torchao.quantization import quant_primitives as ao

    kinds = {"target_dtype": torch.int32, "quant_min": 0, "quant_max": 15}
    scale, zero = ao._choose_qparams_affine_tinygemm(million, ao.MappingType.ASYMMETRIC, (1, 64), **kinds)
    u = ao._quantize_affine_tinygemm(million, (1, 64), scale, zero, torch.int32, 0, 15)
    values = ao._dequantize_affine_tinygemm(u, (1, 64), scale, zero, torch.int32, 0, 15)
    packed = packing.pack(((u - 8) & 15).to(torch.uint8), 4)
    q = QTensor(packed, scale.view(1024, 16), None, zero.view(1024, 16), "int4o_g64_f32")
    assert torch.equal(q.dequantize(), values)
    mine = codes_of(formats.get("uint4_g64_f32").quantize(million))
    spread_out = (million.unflatten(-1, (16, 64)).amax(-1) > million.unflatten(-1, (16, 64)).amin(-1))[
        ..., None
    ].expand(-1, -1, 64)
    assert (mine != u).unflatten(-1, (16, 64))[spread_out].float().mean() < 1e-3


# -- gguf -------------------------------------------------------------------------------------------------------------
def test_mxfp4_of_gguf_but_for_ties(million):
    """gguf takes the smaller magnitude of two equally near, e2m1 the even code; and it has no -0."""
    gguf = pytest.importorskip("gguf", reason="the oracle is gguf")
    raw = gguf.quants.quantize(million.numpy(), gguf.GGMLQuantizationType.MXFP4).reshape(1024, 32, 17)
    q = formats.get("mxfp4").quantize(million)
    assert np.array_equal(q.scales.numpy(), raw[..., 0])
    theirs = np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], -1).reshape(1024, 1024)
    mine, step = codes_of(q).numpy(), np.exp2(raw[..., :1].astype(np.float64) - 127)
    units = np.abs(million.double().numpy().reshape(1024, 32, 32) / step).reshape(1024, 1024)
    tie = np.isin(units, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    same = (mine == theirs) | ((mine & 7) == 0) & ((theirs & 7) == 0)
    assert same[~tie].all() and tie.sum() > 100
    values = gguf.quants.dequantize(raw.reshape(1024, -1), gguf.GGMLQuantizationType.MXFP4)
    packed = packing.pack(torch.from_numpy(theirs), 4)
    assert np.array_equal(QTensor(packed, q.scales, None, None, "mxfp4").dequantize().numpy(), values)


# -- numpy and ml_dtypes, for what no library quantizes ---------------------------------------------------------------
KINDS = {"fp4_e2m1": ("float4_e2m1fn", 6), "fp6_e2m3": ("float6_e2m3fn", 7.5), "fp6_e3m2": ("float6_e3m2fn", 28),
         "fp8_e4m3": ("float8_e4m3fn", 448), "fp8_e5m2": ("float8_e5m2", 57344)}  # fmt: skip


@pytest.mark.parametrize("block", [32, 64, 128, None])
@pytest.mark.parametrize("name", KINDS)
def test_small_floats_equal_numpy(million, name, block):
    kind, top = getattr(ml_dtypes, KINDS[name][0]), np.float32(KINDS[name][1])
    q = formats.get(f"{name}_{f'g{block}' if block else 'row'}").quantize(million)
    blocks = million.numpy().reshape(1024, -1, block or 1024)
    scales = np.abs(blocks).max(-1, keepdims=True) / top
    scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32) if q.scales.dtype == torch.bfloat16 else scales
    units = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0).clip(-top, top)
    codes = units.astype(kind).view(np.uint8).reshape(1024, 1024)
    assert np.array_equal(q.scales.float().numpy(), scales[..., 0]) and np.array_equal(codes_of(q).numpy(), codes)
    want = (codes.view(kind).astype(np.float32).reshape(blocks.shape) * scales).reshape(1024, 1024)
    assert np.array_equal(q.dequantize().numpy(), want)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("block", [32, None])
def test_integers_equal_numpy(million, bits, block):
    top, x = np.float32(2 ** (bits - 1) - 1), million.numpy().reshape(1024, -1, block or 1024)
    suffix = f"g{block}" if block else "row"
    q, u = (formats.get(f"{kind}{bits}_{suffix}").quantize(million) for kind in ("int", "uint"))

    def stored(t):
        return t.astype(ml_dtypes.bfloat16).astype(np.float32) if block else t

    def units(t, step):
        return np.rint(np.divide(t, step, out=np.zeros_like(t), where=step > 0))

    scales = stored(np.abs(x).max(-1, keepdims=True) / top)
    codes = units(x, scales).clip(-top, top)
    assert np.array_equal(q.scales.float().numpy(), scales[..., 0])
    assert np.array_equal(q.dequantize().numpy(), (codes * scales).reshape(1024, 1024))

    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    half = (high - low) / 2
    scales, zero = stored(2 * half / np.float32(2**bits - 1)), stored((high + low) / 2 - half)
    codes = units(x - zero, scales).clip(0, 2**bits - 1)
    assert np.array_equal(u.scales.float().numpy(), scales[..., 0]) and np.array_equal(
        u.zero.float().numpy(), zero[..., 0]
    )
    assert np.array_equal(codes_of(u).numpy(), codes.reshape(1024, 1024).astype(np.uint8))
    assert np.array_equal(u.dequantize().numpy(), (codes * scales + zero).reshape(1024, 1024))
