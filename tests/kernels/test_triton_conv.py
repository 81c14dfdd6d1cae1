"""Convolutions against the reference on unfolded patches: codes bit for bit, outputs within the kernels' tolerance."""

import interpreter
import pytest
import torch
from layers import close, make_layer, packed, run_reference
from torch import nn

interpreter.needed()

from qgen.kernels import layouts, reference, registry
from qgen.kernels.triton_conv import Geometry, conv2d, quantize_patches
from qgen.kernels.triton_linear import NAMES
from qgen.nn.conv import unfold

GEOMETRIES = {
    "3x3": Geometry((3, 3), padding=(1, 1)),
    "1x1": Geometry((1, 1)),
    "3x3_stride2": Geometry((3, 3), (2, 2), (1, 1)),
    "3x1_dilated": Geometry((3, 1), (1, 2), (2, 0), (2, 1)),
    "1x1_stride2": Geometry((1, 1), (2, 2)),
}
FORMATS = {
    "triton_w4s_a8": ("int4_s8_g64", "int8_row"),
    "triton_w8a8": ("int8_row", "int8_row"),
    "triton_w4a8": ("int4_g64", "int8_row"),
    "triton_w4a4": ("int4_g64", "uint4_g64"),
}


def images(channels_last, dtype=torch.bfloat16, b=2, c=22, h=9, w=7):
    x = torch.randn(b, c, h, w).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def patches(x, geometry):
    """(M, K) by torch's own unfold."""
    conv = nn.Conv2d(x.shape[1], 1, **vars(geometry))
    rows, *_ = unfold(x, conv)
    return rows.flatten(0, 1)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("act", ["int8_row", "int4_g64", "uint4_g64"])
def test_codes(act, name, channels_last):
    x, geometry = images(channels_last), GEOMETRIES[name]
    before, rows = x.clone(), patches(x, GEOMETRIES[name])
    k = rows.shape[1]
    kp = layouts.round_up(k, 64)
    smooth, shift, down = (
        torch.rand(k).add(0.5).bfloat16(),
        torch.tensor(0.25).bfloat16(),
        torch.randn(20, k).bfloat16(),
    )
    out = quantize_patches(x, geometry, act, kp, smooth, shift, down)
    want = reference.quantize_act(reference.transform_act(rows, kp, smooth, shift, 0), act)
    codes = layouts.codes_from_groups(out.codes.view(torch.uint8), 8 if act == "int8_row" else 4)
    assert torch.equal(codes, want.codes)
    assert torch.equal(out.scales[:, None] if act == "int8_row" else out.scales.T, want.scales.float())
    assert out.zeros is None or torch.equal(out.zeros, want.zero)
    h = rows.float() @ down.float().T
    assert (out.h[:, :20].float() - h).norm() < 4e-3 * h.norm()
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("kernel", NAMES)
def test_equals_reference(kernel, name):
    weight, act = FORMATS[kernel]
    geometry, run = GEOMETRIES[name], registry.find("conv2d", kernel)
    for dtype in (torch.bfloat16, torch.float16):
        x = images(True, dtype)
        rows = patches(x, geometry)
        slots, ask = make_layer(weight, act, 40, rows.shape[1], dtype, rank=16)
        with interpreter.launches() as names:
            y = run.run(x, *packed(run, slots, ask), geometry)
        assert len(names) == 2
        size = geometry.output(x.shape[2], x.shape[3])
        assert y.shape == (2, 40, *size) and y.is_contiguous(memory_format=torch.channels_last)
        close(y.permute(0, 2, 3, 1).flatten(0, 2), run_reference(rows, slots, ask))


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_a_good_format_is_close_to_the_float_convolution(name):
    """An independent truth: torch's convolution of the dequantized weight, with 8-bit activations."""
    geometry = GEOMETRIES[name]
    x = images(True)
    k = x.shape[1] * geometry.kernel_size[0] * geometry.kernel_size[1]
    slots, ask = make_layer("int8_row", "int8_row", 40, k, smooth=False)
    run = registry.find("conv2d", "triton_w8a8")
    y = run.run(x, *packed(run, slots, ask), geometry)
    w = reference.weight(slots["codes"], slots["scales"], None, None, "int8_row").view(
        40, x.shape[1], *geometry.kernel_size
    )
    want = nn.functional.conv2d(
        x.float(), w, slots["bias"].float(), geometry.stride, geometry.padding, geometry.dilation
    )
    assert (y - want).norm() < 1.5e-2 * want.norm()


def test_no_images():
    slots, ask = make_layer("int8_row", "int8_row", 8, 36)
    run = registry.find("conv2d", "triton_w8a8")
    y = conv2d(torch.zeros(0, 4, 5, 5).bfloat16(), *packed(run, slots, ask), GEOMETRIES["3x3"])
    assert y.shape == (0, 8, 5, 5)


def test_needs_are_those_of_the_linear_kernel():
    assert all(registry.find("conv2d", name).needs == registry.find("linear", name).needs for name in NAMES)
