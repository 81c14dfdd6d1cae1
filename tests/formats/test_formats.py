"""Scaling of every registered format: hand-made values, other people's quantizers, and properties that hold for any data."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgen import formats
from qgen.formats import QTensor, base, log2, packing, table
from tests.formats.kinds import IDEMPOTENT, NAMES, PLAIN, SHARED, UNSIGNED


def data_for(name, *shape, seed=3):
    x = gaussian(*shape, seed=seed)
    return x.abs() if name.startswith(UNSIGNED) else x


def gaussian(rows=512, k=4096, seed=3):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def sqnr_db(x, y):
    return float(10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()))


# -- how good, on Gaussian data, with abs-max scales ------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, db",
    [
        ("int4_g32", 20.3),
        ("int4_g64", 19.4),
        ("int4_g128", 18.6),
        ("int4_row", 16.1),
        ("nvfp4", 20.4),
        ("nvfp4_row", 20.4),
        ("mxfp4", 18.8),
    ],
)
def test_gaussian_sqnr(name, db):
    x = gaussian()
    assert abs(sqnr_db(x, formats.get(name).fake(x)) - db) <= 0.05


def test_integer_subscales_cost_less_than_a_decibel():
    x = gaussian()
    assert sqnr_db(x, formats.get("int4_g64").fake(x)) - sqnr_db(x, formats.get("int4_s8_g64").fake(x)) < 1.0


# -- against others ---------------------------------------------------------------------------------------------------
def linear_scales(blocked, rows, groups):
    """Undoes the tiled order in which comfy-kitchen returns block scales."""
    from comfy_kitchen.float_utils import from_blocked

    return from_blocked(blocked, num_rows=rows, num_cols=groups)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_nvfp4_equals_comfy_kitchen(scale):
    pytest.importorskip("comfy_kitchen", reason="the oracle is comfy-kitchen")
    from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4, quantize_nvfp4

    x = gaussian(128, 256) * scale
    x[3] = 0
    x[5, :16] = 0
    x[7, :16] *= 1e-6  # its scale rounds to zero, and the block with it
    q = formats.get("nvfp4").quantize(x)
    codes, blocked = quantize_nvfp4(x, q.global_scale, hi_first=False)
    scales = linear_scales(blocked.view(torch.uint8), 128, 16)
    assert torch.equal(q.scales.view(torch.uint8), scales)
    assert torch.equal(q.codes, codes)
    theirs = dequantize_nvfp4(codes, q.global_scale, blocked, torch.float32, hi_first=False)
    assert torch.equal(q.dequantize(), theirs)


def test_nvfp4_in_half_precision_differs_from_comfy_kitchen_nowhere():
    pytest.importorskip("comfy_kitchen", reason="the oracle is comfy-kitchen")
    from comfy_kitchen.backends.eager.quantization import quantize_nvfp4

    x = gaussian(128, 256).bfloat16()
    q = formats.get("nvfp4").quantize(x)
    assert torch.equal(q.codes, quantize_nvfp4(x, q.global_scale, hi_first=False)[0])


@pytest.mark.parametrize("name, block", [("int4_g64", 64), ("int4_g128", 128), ("int8_row", 512), ("int4_row", 512)])
def test_integers_equal_a_numpy_line(name, block):
    x = gaussian(32, 512)
    q = formats.get(name).quantize(x)
    top = 7 if name.startswith("int4") else 127
    blocks = x.numpy().reshape(32, -1, block)
    s = np.abs(blocks).max(-1, keepdims=True) / np.float32(top)
    if "_g" in name:
        s = s.astype(ml_dtypes.bfloat16).astype(np.float32)  # as stored
    want = np.clip(np.rint(blocks / s), -top, top).reshape(32, 512)
    fmt = formats.get(name)
    assert np.array_equal(fmt.element.decode(packing.unpack(q.codes, fmt.bits)).numpy(), want)
    assert np.array_equal(q.scales.float().numpy(), s[..., 0])


def test_mxfp4_scales_equal_ml_dtypes_e8m0():
    """OCP: the exponent of the largest power of two in the block, less 2 (the exponent of 6), stored as e8m0."""
    exponents = torch.arange(-120, 121)
    x = torch.zeros(len(exponents), 32)
    x[:, 5] = 1.9 * torch.exp2(exponents.float())
    q = formats.get("mxfp4").quantize(x)
    want = np.exp2((exponents.numpy() - 2).astype(np.float32)).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert np.array_equal(q.scales[:, 0].numpy(), want)
    step = formats.get("mxfp4").step(q.scales, None)[:, 0]
    assert np.array_equal(step.numpy(), want.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def test_every_e8m0_scale_decodes_as_ml_dtypes_does():
    stored = torch.arange(255, dtype=torch.uint8)  # 255 is NaN and never stored
    want = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(formats.get("mxfp4").step(stored, None).numpy(), want)


def test_fp8_row_equals_torch():
    x = gaussian(16, 96)
    q = formats.get("fp8_e4m3_row").quantize(x)
    s = x.abs().amax(1, keepdim=True) / 448
    assert torch.equal(q.scales, s) and torch.equal(
        q.codes, (x / s).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    )


def test_fp8_tensor_has_one_scale():
    q = formats.get("fp8_e5m2_tensor").quantize(gaussian(16, 96))
    assert q.scales.shape == (16, 1) and len(q.scales.unique()) == 1


# -- values by hand ---------------------------------------------------------------------------------------------------
def test_int4_by_hand():
    q = formats.get("int4_g16").quantize(torch.tensor([[7.0, -7, 3.5, 2.5, 0, -0.5, 0.4, -6.6] * 2]))
    assert packing.unpack(q.codes, 4)[0, :8].tolist() == [7, 9, 4, 2, 0, 0, 0, 9] and q.scales.tolist() == [[1.0]]


def test_uint4_covers_min_and_max_by_hand():
    x = torch.arange(16.0)[None] * 2 - 10  # step 2, minimum -10
    q = formats.get("uint4_g16").quantize(x)
    assert packing.unpack(q.codes, 4)[0].tolist() == list(range(16))
    assert (q.scales.item(), q.zero.item()) == (2.0, -10.0) and torch.equal(q.dequantize(), x)


def test_uint4p_by_hand():
    x = torch.tensor([[15.0, 0, 1, 7, 8, 14.4, -3, 0.5] * 2])
    q = formats.get("uint4p_g16").quantize(x)
    assert q.zero is None and packing.unpack(q.codes, 4)[0, :8].tolist() == [15, 0, 1, 7, 8, 14, 0, 0]


def test_int4_s8_is_an_integer_that_fits_int8():
    fmt, x = formats.get("int4_s8_g64"), gaussian(32, 512)
    x[0, :64] *= 100
    q = fmt.quantize(x)
    codes = fmt.element.decode(packing.unpack(q.codes, 4)).unflatten(-1, (-1, 64))
    assert q.scales.dtype == torch.uint8 and int(q.scales.min()) >= 1 and int(q.scales.max()) == 16
    assert float((codes * q.scales.float()[..., None]).abs().max()) <= 112
    assert torch.allclose((codes * q.scales.float()[..., None]).flatten(1) * q.global_scale, q.dequantize())


def test_nvfp4_tensor_scale_uses_the_whole_range():
    x = gaussian(64, 256)
    q = formats.get("nvfp4").quantize(x)
    assert float(q.scales.float().max()) == 448 and math.isclose(
        float(q.global_scale), float(x.abs().max()) / 2688, rel_tol=1e-6
    )


# -- for every format -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_quantize_then_dequantize_is_fake(name):
    fmt, x = formats.get(name), gaussian(24, 512) + 0.3
    q = fmt.quantize(x)
    assert isinstance(q, QTensor) and q.shape == (24, 512) and q.codes.dtype == torch.uint8
    assert torch.equal(q.dequantize(), fmt.fake(x))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fmt.quantize(x.to(dtype)).dequantize(dtype), fmt.fake(x.to(dtype)))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_what_bits_per_value_says(name):
    fmt, x = formats.get(name), gaussian(16, 1024)
    q = fmt.quantize(x)
    whole_tensor = q.global_scale.nbytes if fmt.global_scale == "tensor" else 0
    assert (q.nbytes - whole_tensor) * 8 == fmt.bits_per_value(1024) * x.numel()


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_what_the_format_says(name):
    fmt = formats.get(name)
    k = fmt.unit * -(-256 // fmt.unit)
    q = fmt.quantize(gaussian(6, k))
    found = {slot: t for slot in ("codes", "scales", "global_scale", "zero") if (t := getattr(q, slot)) is not None}
    assert fmt.shapes(6, k) == {slot: (tuple(t.shape), t.dtype) for slot, t in found.items()} and q.shape == (6, k)


@pytest.mark.parametrize("name", [n for n in PLAIN if not n.startswith("log")])
def test_half_a_step_at_most(name):
    """No value inside the range is off by more than half the distance of its two neighbours in the grid."""
    fmt, x = formats.get(name), gaussian(16, 512).abs()
    q = fmt.quantize(x)
    step = fmt.step(q.scales, q.global_scale)[..., None]
    y, grid = fmt.blocks(q.dequantize()), sorted(v for v in fmt.element.values if v == v)
    z = 0 if q.zero is None else q.zero.float()[..., None]
    normal = (fmt.blocks(x) - z) / step
    inside = (normal >= fmt.element.min) & (normal <= fmt.element.max)
    assert inside.float().mean() > (0.5 if name.startswith(("binary", "ternary")) else 0.9)
    grid = torch.tensor(grid, dtype=torch.float64)
    nearest = (normal.double()[inside][:, None] - grid).abs().amin(1) if len(grid) < 20 else None
    got = ((y - z) / step).double()[inside]
    if nearest is not None:
        assert torch.allclose((got - normal.double()[inside]).abs(), nearest, atol=1e-4)


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_twice_is_once(name):
    """Values of the second pass are those of the first, but for the last bit of float32 scales."""
    fmt = formats.get(name)
    once = fmt.fake(data_for(name, 64, 512))
    twice = fmt.fake(once)
    if fmt.scale_dtype == torch.float32 or fmt.global_scale:
        assert torch.allclose(twice, once, rtol=3e-7, atol=0)
    else:
        assert torch.equal(twice, once)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "nvfp4_dynamic"])
@pytest.mark.parametrize("factor", [0.125, 8.0])
def test_powers_of_two_scale_scales_and_not_codes(name, factor):
    fmt, x = formats.get(name), gaussian(16, 512)
    a, b = fmt.quantize(x), fmt.quantize(x * factor)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.dequantize() * factor, b.dequantize())


@pytest.mark.parametrize("name", [n for n in NAMES if formats.get(n).block and formats.get(n).global_scale is None])
def test_blocks_are_independent(name):
    fmt, x = formats.get(name), gaussian(4, 512)
    y = x.clone()
    y[:, : fmt.block] = 1e3
    assert torch.equal(fmt.fake(x)[:, fmt.block :], fmt.fake(y)[:, fmt.block :])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_but_for_what_the_tensor_shares(name):
    fmt, x = formats.get(name), data_for(name, 4, 512)
    if name not in SHARED:
        assert torch.equal(fmt.fake(x)[1:], fmt.fake(x[1:]))
        return
    q = fmt.quantize(x)
    per_row = fmt.global_scale == "row"
    rest = QTensor(
        None,
        q.scales[1:],
        q.global_scale[1:] if per_row else q.global_scale,
        None if q.zero is None else q.zero[1:],
        name,
    )
    assert torch.equal(fmt.quantize(x[1:], like=rest).codes, q.codes[1:])


@pytest.mark.parametrize("name", [n for n in NAMES if not re.fullmatch(r"uint\d_tensor", n)])  # 0 is no code of theirs
def test_zero_rows_stay_zero_and_finite(name):
    x = gaussian(4, 512)
    x[2] = 0
    y = formats.get(name).fake(x)
    assert y.isfinite().all() and not y[2].any()
    assert not formats.get(name).fake(torch.zeros(3, 512)).any()


@pytest.mark.parametrize("name", [n for n in PLAIN if n.startswith("uint") and formats.get(n).zero_point])
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_blocks_are_exact_with_zero_points(name, value):
    assert torch.equal(formats.get(name).fake(torch.full((2, 512), value)), torch.full((2, 512), value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_magnitudes_stay_finite(name, size):
    assert formats.get(name).fake(gaussian(4, 512) * size).isfinite().all()


@pytest.mark.parametrize("name", [n for n in NAMES if formats.get(n).block])
def test_k_that_no_block_divides_is_refused(name):
    fmt = formats.get(name)
    with pytest.raises(
        ValueError, match=f"{name} needs K divisible by its block of {fmt.block}, found K={fmt.block + 8}; pad K"
    ):
        fmt.quantize(torch.zeros(2, fmt.block + 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_default_dtype_changes_nothing(name, dtype):
    """Many scripts set it to bfloat16. The grids of elements are cached, so a wrong one would outlive the setting."""
    fmt, x = formats.get(name), gaussian(16, 256)
    want = fmt.fake(x)
    torch.set_default_dtype(dtype)
    for cache in (base._grid, base._table, table._sorted, log2._bounds):
        cache.cache_clear()
    try:
        assert torch.equal(fmt.fake(x), want)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(fmt.fake(x), want)


@pytest.mark.parametrize("name", NAMES)
def test_not_contiguous_and_more_axes(name):
    fmt, x = formats.get(name), gaussian(12, 512)
    assert torch.equal(fmt.fake(x.view(3, 4, 512)), fmt.fake(x).view(3, 4, 512))
    assert torch.equal(fmt.fake(x.T.contiguous().T), fmt.fake(x))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("binary", "planes1_"))])  # signs stay
def test_like_reuses_scales(name):
    fmt, x = formats.get(name), gaussian(64, 512)  # vectors enough not to have an entry each
    q = fmt.quantize(x)
    again = fmt.quantize(x * 0.9, like=q)
    assert again.scales is q.scales and not torch.equal(again.codes, q.codes)


def test_clip_trades_saturation_for_resolution():
    fmt, x = formats.get("int4_g64"), gaussian(4, 64)
    x[:, 0] = 20
    near = (fmt.fake(x, clip=0.3) - x)[:, 1:].square().sum()
    assert near < (fmt.fake(x) - x)[:, 1:].square().sum() and float(fmt.fake(x, clip=0.5).max()) < 11


def test_reciprocal_agrees_with_division_to_one_code():
    fmt, x = formats.get("int4_g64"), gaussian(64, 512)
    a = fmt.element.decode(packing.unpack(fmt.quantize(x).codes, 4))
    b = fmt.element.decode(packing.unpack(fmt.quantize(x, reciprocal=True).codes, 4))
    assert (a - b).abs().max() <= 1 and (a != b).float().mean() < 1e-3


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 4), st.floats(-20, 20), st.integers(0, 2**31))
def test_error_is_bounded_by_the_range(name, rows, exponent, seed):
    """For any scale of data: finite, and no value off by more than a part of its block's largest magnitude."""
    fmt = formats.get(name)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x = x.abs() if name.startswith(UNSIGNED) else x
    y = fmt.fake(x)
    amax = x.abs().max() if name in SHARED else fmt.blocks(x).abs().amax(-1, keepdim=True)
    error = fmt.blocks((y - x).abs())
    fitted = name.startswith(("binary", "lut"))  # to the mean: a value that stands alone may be far off
    limit = None if name == "nvfp4_dynamic" else 1.0 if fmt.bits <= 2 or fitted else 0.35
    assert y.isfinite().all()
    if limit:
        assert (error <= limit * amax + 1e-30).all()


@pytest.mark.parametrize(
    "k, names, multiple, want",
    [
        (100, ("int4_g64", "nvfp4"), 1, 128),
        (96, ("int4_row",), 1, 96),
        (33, ("int4_row", None), 1, 34),
        (40, ("int8_row",), 16, 48),
    ],
)
def test_padded(k, names, multiple, want):
    assert formats.padded(k, *names, multiple=multiple) == want


def test_unknown_format_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown number format 'int4_g46' \(did you mean 'int4_g64'\?\)"):
        formats.get("int4_g46")
