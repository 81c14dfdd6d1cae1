"""The op: schema, shapes under compile, gradient against autograd; and which kernel a convolution gets."""

import pytest
import torch
from images import GEOMETRIES, as_rows, images, make_conv, patches
from layers import run_reference
from torch import nn

from qgen.errors import NoKernel
from qgen.kernels import conv_ops, registry
from qgen.kernels.conv_ops import ConvAsk, Geometry
from qgen.kernels.conv_reference import fold, unfold
from qgen.kernels.slots import SLOTS
from qgen.nn import QuantConv2d
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, C = 24, 12
FORMATS = {"w4a16": ("int4_g64", ""), "w4a4": ("int4_g64", "uint4_g64"), "w4a8": ("int4_s8_g64", "int8_row")}


def layer(formats="w4a4", geometry="3x3", rank=4, kernel="reference", dtype=torch.float32):
    weight, act = FORMATS[formats]
    like = nn.Conv2d(C, N, **vars(GEOMETRIES[geometry]))
    k = C * GEOMETRIES[geometry].taps
    site = Site("l", "conv2d", "", 0, "x", (N, k))
    low_rank = {"down": torch.randn(rank, k) / 10, "up": torch.randn(N, rank) / 10} if rank else {}
    draft = Draft(
        (site,), Spec(weight, act or None), like.weight.detach().flatten(1), like.bias.detach(), dtype=torch.float32,
        smooth=torch.rand(k) + 0.5, **low_rank,
    )  # fmt: skip
    made = QuantConv2d.from_draft(draft, like, dtype=dtype)
    made.prepare(kernel)
    return made


def arguments(made, x):
    geometry = (made.kernel_size, made.stride, made.padding, made.dilation)
    slots = [getattr(made, slot) for slot in SLOTS]
    return (x, *slots, made.weight_format, made.act_format, made.n, made.k, made.hadamard, *geometry, made.kernel)


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("geometry", ["3x3", "1x1_stride2", "3x1_dilated"])
def test_opcheck(formats, geometry):
    x = torch.randn(2, C, 7, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.qgen.conv2d.default, arguments(layer(formats, geometry), x))


def test_opcheck_of_the_gradient():
    made = layer()
    slots = [getattr(made, slot) for slot in SLOTS[:7]]
    dy = torch.randn(2, N, 7, 6).to(memory_format=torch.channels_last)
    geometry = (made.kernel_size, made.stride, made.padding, made.dilation)
    rest = (made.weight_format, made.n, made.k, made.hadamard, *geometry, made.kernel, 7, 6)
    torch.library.opcheck(torch.ops.qgen.conv2d_grad.default, (dy, *slots, *rest))


@pytest.mark.parametrize("formats", FORMATS)
def test_compiles_to_the_same_numbers_without_a_break(formats):
    model = nn.Sequential(layer(formats, "3x3_stride2"), nn.SiLU(), nn.Conv2d(N, 4, 1))
    x = images(dtype=torch.float32, c=C)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    assert torch.equal(compiled(images(dtype=torch.float32, c=C, h=12) * 0 + 1), model(torch.ones(2, C, 12, 7)))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_meaning_is_the_linear_formula_on_patches(geometry):
    g = GEOMETRIES[geometry]
    made, x = layer(geometry=geometry), images(c=C, dtype=torch.float32)
    slots = made.canonical()
    _, ask = make_conv("int4_g64", "uint4_g64", N, C, g, torch.float32)
    want = run_reference(patches(x, g), slots, ask)
    y = made(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(as_rows(y), want, atol=1e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradient_is_that_of_the_float_convolution(geometry):
    """With float activations the layer is a convolution with `dequantize()`, low rank included; autograd knows that one."""
    g, made = GEOMETRIES[geometry], layer("w4a16", geometry)
    x = torch.randn(2, C, 9, 7, requires_grad=True)
    y = made(x)
    dy = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, dy)
    want = nn.functional.conv2d(x, made.dequantize(), made.bias, g.stride, g.padding, g.dilation)
    assert torch.allclose(y, want, atol=1e-4)
    assert torch.allclose(found, torch.autograd.grad(want, x, dy)[0], atol=1e-4)


@pytest.mark.parametrize("kernel", ["cpu_int8", "cpu_dequant"])
def test_cpu_kernels_serve_convolutions_in_their_layout(kernel):
    names = [key.partition("/")[2] for key in registry.kernels if key.startswith("linear/")]
    if kernel not in names:
        pytest.skip(f"no kernel of this name: {names}")
    made, x = layer("w4a8"), images(c=C, dtype=torch.float32)
    want, before = made(x), {name: t.clone() for name, t in made.canonical().items()}
    if made.serves(kernel) is None:
        pytest.skip(f"{kernel} does not serve {made.ask()}")
    assert made.prepare(kernel) == kernel
    assert (made(x) - want).norm() < 4e-3 * want.norm()
    assert all(torch.equal(t, before[name]) for name, t in made.canonical().items())


def test_unfold_and_fold_are_transposes():
    for g in GEOMETRIES.values():
        x = torch.randn(2, C, 9, 7, dtype=torch.float64)
        rows = unfold(x, g)
        other = torch.randn_like(rows)
        assert torch.allclose((rows * other).sum(), (x * fold(other, g, (9, 7))).sum())


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, C + 1, 7, 6), rf"wants images \(B, {C}, H, W\), found \(2, {C + 1}, 7, 6\)"),
        ((7, 6), "wants images"),
        ((2, C, 0, 6), "no output for images of 0 x 6"),
    ],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        layer(geometry="3x3_stride2")(torch.zeros(shape))


# -- dispatch -------------------------------------------------------------------------------------------------------------
def ask(formats, device="cuda", capability=(8, 9), geometry="3x3", traits=()):
    conv_ops.offer()
    traits = frozenset({"smooth", "lowrank", "bias", *traits})
    return ConvAsk(
        "conv2d", device, *formats, torch.bfloat16, 320, 2880, 32, capability, traits, geometry=GEOMETRIES[geometry]
    )


TABLE = {
    ("int4_s8_g64", "int8_row"): "triton_w4s_a8",
    ("int8_row", "int8_row"): "triton_w8a8",
    ("int4_g64", "int8_row"): "triton_w4a8",
    ("int4_g64", "uint4_g64"): "triton_w4a4",
    ("int4_g64", ""): "triton_w4a16",
}


@pytest.mark.parametrize("formats", TABLE, ids="-".join)
def test_choice(formats):
    pytest.importorskip("triton", reason="most kernels are written in Triton, which is not installed")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        assert registry.choose(ask(formats, capability=capability)).name == TABLE[formats]
    assert registry.choose(ask(formats, "hip", "gfx942")).name == TABLE[formats]
    assert registry.choose(ask(formats, capability=(7, 5))).name == "reference"
    assert not registry.choose(ask(formats, "cpu", None)).name.startswith("triton")


def test_hadamard_goes_by_patches():
    pytest.importorskip("triton", reason="most kernels are written in Triton, which is not installed")
    rotated = ask(("int4_s8_g64", "int8_row"), traits=("hadamard",))
    assert registry.choose(rotated).name == "triton_w4s_a8_patches"
    with pytest.raises(NoKernel, match=r"cannot do hadamard(.|\n)*triton_w4s_a8_patches +available"):
        registry.choose(rotated, "triton_w4s_a8")


def test_every_linear_kernel_serves_convolutions():
    conv_ops.offer()
    names = {key.partition("/")[2] for key in registry.kernels if key.startswith("linear/")}
    assert names <= {key.partition("/")[2] for key in registry.kernels if key.startswith("conv2d/")}


def test_an_ask_says_its_geometry():
    assert str(ask(("int4_g64", ""), geometry="3x1_dilated")).endswith("3x1, stride 1x2, padding 2x0, dilation 2x1")
    assert Geometry((3, 3), (2, 2), (1, 1)).output(9, 8) == (5, 4)
