"""The implicit product against the reference on unfolded patches: scales bit for bit, outputs as if all codes were."""

import interpreter
import pytest
import torch
from images import GEOMETRIES, as_rows, images, make_conv, patches
from layers import close, packed, run_reference
from torch import nn

interpreter.needed()

from qgen.kernels import reference, registry
from qgen.kernels.conv_ops import Geometry
from qgen.kernels.slots import Slots
from qgen.kernels.triton_conv import KEEP_ASM, implicit, measure, pack, to_taps, unpack

interpreter.register_asm(KEEP_ASM, lambda a: (a,))

FORMATS = {"triton_w4s_a8": ("int4_s8_g64", "int8_row"), "triton_w8a8": ("int8_row", "int8_row")}
SIZES = {"ragged": (2, 22, 9, 7), "blocks": (1, 128, 6, 11), "one-pixel": (3, 64, 1, 1), "row": (1, 5, 1, 63)}


def run(kernel, x, slots, ask):
    """(y as rows, names of the kernels launched)."""
    found = registry.find("conv2d", kernel)
    with interpreter.launches() as names:
        y = found.run(x, packed(found, slots, ask), ask.geometry)
    size = ask.geometry.output(*x.shape[2:])
    assert y.shape == (x.shape[0], ask.n, *size) and y.is_contiguous(memory_format=torch.channels_last)
    return as_rows(y), names


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "channels_first"])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("size", SIZES)
def test_scales_and_low_rank(size, name, channels_last):
    b, c, h, w = SIZES[size]
    geometry = GEOMETRIES[name]
    x = images(channels_last, b=b, c=c, h=h, w=w)
    before, rows = x.clone(), patches(x, geometry)
    k = rows.shape[1]
    smooth, shift, down = torch.rand(k).add(0.5).bfloat16(), torch.rand(k).bfloat16(), torch.randn(20, k).bfloat16()
    moved = (to_taps(t, k, geometry.taps) for t in (smooth, shift, down))
    out = measure(x, geometry, *moved)
    want = reference.quantize_act(reference.transform_act(rows, k, smooth, shift, 0), "int8_row")
    assert torch.equal(out.scales[:, None], want.scales.float()) and torch.equal(out.steps, 1 / out.scales)
    assert torch.equal(out.inverses, to_taps(1 / smooth.float(), k, geometry.taps))
    product = rows.float() @ down.float().T
    assert (out.h[:, :20].float() - product).norm() < 4e-3 * product.norm()
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("kernel", FORMATS)
def test_equals_reference(kernel, name, size):
    b, c, h, w = SIZES[size]
    geometry = GEOMETRIES[name]
    for dtype in (torch.bfloat16, torch.float16):
        x = images(size != "ragged", dtype, b, c, h, w)
        before = x.clone()
        slots, ask = make_conv(*FORMATS[kernel], 40, c, geometry, dtype, rank=16)
        y, names = run(kernel, x, slots, ask)
        assert len(names) == 2
        close(y, run_reference(patches(x, geometry), slots, ask))
        assert torch.equal(x, before)


@pytest.mark.parametrize("shift", [None, "scalar", "row"])
@pytest.mark.parametrize("kernel", FORMATS)
def test_every_code_is_the_references(kernel, shift):
    """In float32 without a low-rank branch both sums are exact: one code that differs would show a thousandfold."""
    geometry = GEOMETRIES["3x3"]
    x = images().float()
    slots, ask = make_conv(*FORMATS[kernel], 40, 22, geometry, torch.float32, shift=shift)
    y, _ = run(kernel, x, slots, ask)
    want = run_reference(patches(x, geometry), slots, ask)
    assert (y - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("fill", ["zeros", "equal", "huge", "one-hot"])
@pytest.mark.parametrize("kernel", FORMATS)
def test_odd_images(kernel, fill):
    geometry, x = GEOMETRIES["3x3"], images()
    if fill == "zeros":
        x.zero_()
    elif fill == "equal":
        x.fill_(-0.75)
    elif fill == "huge":
        x.mul_(1e5)
    else:
        x.zero_()[0, 3, 4, 4] = 2.0
    slots, ask = make_conv(*FORMATS[kernel], 40, 22, geometry, rank=16)
    y, _ = run(kernel, x, slots, ask)
    close(y, run_reference(patches(x, geometry), slots, ask))
    if fill == "zeros":
        assert torch.equal(y, slots["bias"].expand_as(y))


@pytest.mark.parametrize("name", ["3x3", "1x1"])
@pytest.mark.parametrize("kernel", FORMATS)
def test_stored_activation_scales(kernel, name):
    """Of which two thirds of the values are within what they cover."""
    geometry, x = GEOMETRIES[name], images().float()
    slots, ask = make_conv(*FORMATS[kernel], 40, x.shape[1], geometry, torch.float32, shift="scalar")
    slots["act_scale"] = torch.tensor([1 / 127])
    y, names = run(kernel, x, slots, ask)
    want = run_reference(patches(x, geometry), slots, ask)
    assert len(names) == 2 and (y - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("options", [{"rank": 0}, {"smooth": False}, {"bias": False}, {"rank": 130}])
def test_absent_parts(options):
    geometry, x = GEOMETRIES["3x3_stride2"], images()
    slots, ask = make_conv("int4_s8_g64", "int8_row", 40, 22, geometry, **options)
    y, _ = run("triton_w4s_a8", x, slots, ask)
    close(y, run_reference(patches(x, geometry), slots, ask))


@pytest.mark.parametrize("name", ["3x3", "1x1"])
def test_a_good_format_is_close_to_the_float_convolution(name):
    """An independent truth: torch's convolution of the dequantized weight, with 8-bit activations."""
    geometry, x = GEOMETRIES[name], images()
    slots, ask = make_conv("int8_row", "int8_row", 40, 22, geometry, smooth=False)
    y, _ = run("triton_w8a8", x, slots, ask)
    w = reference.weight(slots["codes"], slots["scales"], None, None, "int8_row")
    w = w[:, : ask.k].view(40, 22, *geometry.kernel_size)
    want = nn.functional.conv2d(
        x.float(), w, slots["bias"].float(), geometry.stride, geometry.padding, geometry.dilation
    )
    assert (y - as_rows(want)).norm() < 1.5e-2 * want.norm()


@pytest.mark.parametrize("weight", ["int4_s8_g64", "int4_s8_g128", "int8_row"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_layout_is_a_bijection(name, weight):
    geometry = GEOMETRIES[name]
    slots, ask = make_conv(weight, "int8_row", 24, 22, geometry, rank=16, shift="row")
    slots["codes"] = torch.randint(0, 256, slots["codes"].shape, dtype=torch.uint8)  # all nibbles, -8 and padding too
    there = pack(slots, ask)
    back = unpack(there, ask)
    assert set(back) == set(slots) and all(torch.equal(back[n], slots[n]) for n in slots)
    assert all(back[n].dtype == slots[n].dtype for n in slots)


def test_held_codes_are_the_same_codes():
    geometry, x = GEOMETRIES["3x3"], images()
    slots, ask = make_conv("int4_s8_g64", "int8_row", 40, 22, geometry, rank=16)
    slots = Slots.of(pack(slots, ask), ask.weight, ask.act, ask.n)
    seen = measure(x, geometry, slots.smooth, slots.shift, slots.down)
    plain, asm = (implicit(x, slots, geometry, seen, asm=on) for on in (False, True))
    assert torch.equal(plain, asm)


def test_tiles_wider_than_one_program():
    geometry = Geometry((3, 3), padding=(1, 1))
    x = images(b=1, c=64, h=16, w=13)  # 208 pixels, 136 outputs: both wrap around
    slots, ask = make_conv("int4_s8_g64", "int8_row", 136, 64, geometry, rank=16)
    y, _ = run("triton_w4s_a8", x, slots, ask)
    close(y, run_reference(patches(x, geometry), slots, ask))


def test_no_images():
    geometry = GEOMETRIES["3x3"]
    slots, ask = make_conv("int8_row", "int8_row", 8, 4, geometry)
    found = registry.find("conv2d", "triton_w8a8")
    assert found.run(torch.zeros(0, 4, 5, 5).bfloat16(), packed(found, slots, ask), geometry).shape == (0, 8, 5, 5)


def test_rank_and_hadamard_are_refused():
    slots, ask = make_conv("int4_s8_g64", "int8_row", 24, 22, GEOMETRIES["3x3"], rank=300)
    with pytest.raises(ValueError, match="up to rank 256, found 300"):
        pack(slots, ask)
    assert "hadamard" in registry.find("conv2d", "triton_w4s_a8").needs.refuses
