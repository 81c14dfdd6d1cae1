"""Convolutions with activations in groups: codes of patches bit for bit, outputs within the kernels' tolerance."""

import interpreter
import pytest
import torch
from images import GEOMETRIES, as_rows, images, make_conv, patches
from layers import close, packed, run_reference

interpreter.needed()

from qgen.kernels import layouts, reference, registry
from qgen.kernels.triton_linear import NAMES
from qgen.kernels.triton_patches import quantize_patches

FORMATS = {
    "triton_w4s_a8_patches": ("int4_s8_g64", "int8_row"),
    "triton_w8a8_patches": ("int8_row", "int8_row"),
    "triton_w4a8": ("int4_g64", "int8_row"),
    "triton_w4a4": ("int4_g64", "uint4_g64"),
}


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
@pytest.mark.parametrize("kernel", FORMATS)
def test_equals_reference(kernel, name):
    geometry, run = GEOMETRIES[name], registry.find("conv2d", kernel)
    for dtype in (torch.bfloat16, torch.float16):
        x = images(True, dtype)
        slots, ask = make_conv(*FORMATS[kernel], 40, x.shape[1], geometry, dtype, rank=16)
        with interpreter.launches() as names:
            y = run.run(x, packed(run, slots, ask), geometry)
        assert len(names) == 2
        size = geometry.output(x.shape[2], x.shape[3])
        assert y.shape == (2, 40, *size) and y.is_contiguous(memory_format=torch.channels_last)
        close(as_rows(y), run_reference(patches(x, geometry), slots, ask))


@pytest.mark.parametrize("name", ["3x3", "1x1"])
@pytest.mark.parametrize("kernel", FORMATS)
def test_stored_activation_scales(kernel, name):
    geometry, run, x = GEOMETRIES[name], registry.find("conv2d", kernel), images()
    slots, ask = make_conv(*FORMATS[kernel], 40, x.shape[1], geometry, rank=16)
    groups = 1 if FORMATS[kernel][1] == "int8_row" else slots["codes"].shape[1] // 32
    slots["act_scale"] = torch.rand(groups).add(0.2) if groups > 1 else torch.tensor([0.01])
    close(as_rows(run.run(x, packed(run, slots, ask), geometry)), run_reference(patches(x, geometry), slots, ask))


def test_hadamard_along_patches():
    geometry, run = GEOMETRIES["3x3"], registry.find("conv2d", "triton_w4s_a8_patches")
    x = images()
    slots, ask = make_conv("int4_s8_g64", "int8_row", 40, 22, geometry, hadamard=64)
    y = run.run(x, packed(run, slots, ask, hadamard=64), geometry)
    close(as_rows(y), run_reference(patches(x, geometry), slots, ask, hadamard=64))


def test_no_images():
    geometry, run = GEOMETRIES["3x3"], registry.find("conv2d", "triton_w4a4")
    slots, ask = make_conv("int4_g64", "uint4_g64", 8, 4, geometry)
    assert run.run(torch.zeros(0, 4, 5, 5).bfloat16(), packed(run, slots, ask), geometry).shape == (0, 8, 5, 5)


def test_needs_and_layouts_are_those_of_the_linear_kernels():
    assert {name.removesuffix("_patches") for name in FORMATS} == set(NAMES)
    for name in FORMATS:
        mine, like = registry.find("conv2d", name), registry.find("linear", name.removesuffix("_patches"))
        assert (mine.pack, mine.unpack) == (like.pack, like.unpack)
        assert mine.needs == like.needs
