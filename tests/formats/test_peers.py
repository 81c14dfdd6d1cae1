"""Formats that other projects' files need: dtypes of scales, whole zero points, and that no kernel mistakes one arithmetic for another."""

import pytest
import torch

from qgen import formats
from qgen.formats import QTensor, packing
from qgen.kernels import reference, registry
from qgen.kernels.slots import Slots


@pytest.mark.parametrize("name", ("uint4z_g32", "uint4z_g128_f16", "uint8z_row", "uint3z_g64_f32", "uint4z_g64_f32"))
def test_whole_zero_points(name):
    fmt, x = formats.get(name), torch.randn(8, 256) + 0.5
    q = fmt.quantize(x)
    codes = packing.unpack(q.codes, fmt.bits).float().unflatten(1, (q.scales.shape[1], -1))
    by_hand = ((codes - q.zero.float()[..., None]) * q.scales.float()[..., None]).flatten(1)
    assert torch.equal(q.dequantize(), by_hand)
    assert q.scales.dtype == q.zero.dtype == fmt.scale_dtype and torch.equal(q.zero, q.zero.round())
    assert int(codes.min()) >= 0 and int(codes.max()) <= 2**fmt.bits - 1
    step = q.scales.float()[..., None].expand(codes.shape).flatten(1)
    assert (
        (x - by_hand).abs() <= 1.02 * step
    ).all()  # half a step of rounding, half of the zero point's, and the scale's own
    assert torch.equal(fmt.fake(x), q.dequantize())
    again = fmt.quantize(q.dequantize(), like=q)
    assert torch.equal(again.codes, q.codes)


def test_zero_stays_zero():
    q = formats.get("uint4z_g32").quantize(
        torch.cat([torch.zeros(2, 32), torch.rand(2, 32) + 1, -torch.rand(2, 32) - 1], 1)
    )
    assert not q.dequantize()[:, :32].any()
    assert (q.zero[:, 1] == 0).all() and (q.zero[:, 2] == 15).all()  # ranges above or below 0 are widened to it


@pytest.mark.parametrize(
    "name", ("int4_g32_f16", "int4_g128_f32", "uint4_g32_f16", "int8_g64_f16", "int5_g32_f16", "uint2_g16_f32")
)
def test_scales_keep_their_dtype(name):
    fmt = formats.get(name)
    q = fmt.quantize(torch.randn(4, 256))
    dtype = {"f16": torch.float16, "f32": torch.float32}[name.rpartition("_")[2]]
    assert q.scales.dtype == fmt.scale_dtype == dtype and (q.zero is None or q.zero.dtype == dtype)
    plain = formats.get(name.rpartition("_")[0]) if name.rpartition("_")[0] in formats.formats else fmt
    assert (fmt.block, fmt.element) == (plain.block, plain.element)
    assert torch.equal(fmt.quantize(q.dequantize(), like=q).codes, q.codes)


def test_signed_codes_with_an_offset():
    codes = torch.arange(-8, 8).repeat(2, 2)
    scales, zero = torch.tensor([[0.5], [2.0]]).bfloat16(), torch.tensor([[3.0], [-1.0]]).bfloat16()
    q = QTensor(packing.pack((codes & 15).to(torch.uint8), 4), scales, None, zero, "int4o_g32")
    assert torch.equal(q.dequantize(), codes * scales.float() + zero.float())


@pytest.mark.parametrize(
    "name", ("uint4z_g64", "uint4z_g64_f16", "int4o_g64", "int4_g64_f16", "uint4_g64_f32", "uint8z_row", "int5_g32_f16")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("f32", "bf16"))
def test_every_kernel_that_serves_it_computes_it(name, dtype):
    """64 rows: enough for the kernels that want many."""
    n, k = 64, 256
    q, x = formats.get(name).quantize(torch.randn(n, k)), torch.randn(64, k).to(dtype)
    slots = {"codes": q.codes, "scales": q.scales, "zero": q.zero}
    slots = {slot: t for slot, t in slots.items() if t is not None}
    want = reference.linear(x, Slots.of(slots, name, "", n)).float()
    ask = registry.Ask("linear", "cpu", name, "", dtype, n, k)
    served = [
        kernel for _, kernel in registry.kernels.items() if kernel.op == "linear" and not kernel.needs.refusals(ask)
    ]
    assert {"reference", "cpu_dequant"} <= {kernel.name for kernel in served}
    for kernel in served:
        packed = kernel.pack(dict(slots), ask)
        got = kernel.run(x, Slots.of(packed, name, "", n)).float()
        assert (got - want).norm() <= (8e-3 if dtype == torch.bfloat16 else 1e-5) * want.norm(), kernel.name
