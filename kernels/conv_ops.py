r"""The op `torch.ops.qgen.conv2d`: a quantized convolution. Schema, checks, shape function, dispatch by name, gradient for x.

    y[b, :, i, j] = linear(patch(b, i, j)),      K = C · kernel height · kernel width, channels slowest

x (B, C, H, W) of any strides to y (B, N, H', W') in x's dtype, channels-last in memory. The tensors of the layer are those of the op
`linear` (`qgen.kernels.slots`), with K as above; what they mean is `conv_reference.py`. One group, zero padding.

A layer asks with a `ConvAsk`. Every kernel of the op `linear` also serves convolutions, by unfolding patches first; kernels that never
write them stand before it. `offer` adds the former once all kernels are known.
"""

__all__ = ["ConvAsk", "Geometry", "check", "conv2d", "offer"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgen.kernels import ops, registry
from qgen.kernels.registry import Ask, Kernel, register
from qgen.kernels.slots import SLOTS, Slots


@dataclass(frozen=True)
class Geometry:
    """Of a convolution with one group and zero padding; pairs are (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        return cls(*(tuple(getattr(conv, name)) for name in ("kernel_size", "stride", "padding", "dilation")))

    @property
    def taps(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def pointwise(self) -> bool:
        """Whether each patch is one pixel of the image, so that nothing is unfolded."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an image of this size."""
        sizes = zip((height, width), self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * pad - step * (taps - 1) - 1) // stride + 1 for n, taps, stride, pad, step in sizes)

    def __str__(self) -> str:
        rest = ((self.stride, "stride", (1, 1)), (self.padding, "padding", (0, 0)), (self.dilation, "dilation", (1, 1)))
        words = [f"{name} {pair[0]}x{pair[1]}" for pair, name, usual in rest if pair != usual]
        return ", ".join([f"{self.kernel_size[0]}x{self.kernel_size[1]}", *words])


@dataclass(frozen=True)
class ConvAsk(Ask):
    """What a convolution wants to run, and where; k = C · taps."""

    geometry: Geometry = Geometry((1, 1))

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.geometry}"


def check(x: Tensor, k: int, geometry: Geometry) -> None:
    """ValueError, in one line, for images that the layer does not fit or that are smaller than its kernel."""
    channels = k // geometry.taps
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"this convolution wants images (B, {channels}, H, W), found {tuple(x.shape)}")
    if min(geometry.output(*x.shape[2:])) < 1:
        raise ValueError(
            f"a {geometry} convolution has no output for images of {x.shape[2]} x {x.shape[3]}: use larger ones"
        )


def offer() -> None:
    """Registers, for each kernel of the op `linear` without one of its name here, the kernel that unfolds patches for it."""
    from qgen.kernels.conv_reference import unfolding

    for key, kernel in registry.kernels.items():
        if kernel.op == "linear" and f"conv2d/{key.partition('/')[2]}" not in registry.kernels:
            register(unfolding(kernel))


def find(name: str) -> Kernel:
    """The kernel `name` of the op; ValueError listing them if there is none."""
    offer()
    return registry.find("conv2d", name)


_TENSORS = "Tensor codes, Tensor scales, Tensor? global_scale, Tensor? zero, Tensor? smooth, Tensor? down, Tensor? up"  # SLOTS[:7]
_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
ops._library.define(
    f"conv2d(Tensor x, {_TENSORS}, Tensor? bias, Tensor? shift, Tensor? act_scale, str weight, str act, int n, int k, "
    f"int hadamard, {_GEOMETRY}, str kernel) -> Tensor"
)
ops._library.define(
    f"conv2d_grad(Tensor dy, {_TENSORS}, str weight, int n, int k, int hadamard, {_GEOMETRY}, str kernel, SymInt height, "
    "SymInt width) -> Tensor"
)


def _conv2d(x: Tensor, *args) -> Tensor:
    *tensors, weight, act, n, k, hadamard, size, stride, padding, dilation, name = args
    geometry = Geometry(*map(tuple, (size, stride, padding, dilation)))
    check(x, k, geometry)
    run, slots = find(name).run, Slots(*tensors, weight, act, n, hadamard)
    with torch.autocast(x.device.type, enabled=False):  # a kernel chooses its own precision
        return ops.own(run(x, slots, geometry))


def _conv2d_grad(dy: Tensor, *args) -> Tensor:
    from qgen.kernels import conv_reference

    *tensors, weight, n, k, hadamard, size, stride, padding, dilation, name, height, width = args
    geometry = Geometry(*map(tuple, (size, stride, padding, dilation)))
    ask = ConvAsk("conv2d", dy.device.type, weight, n=n, k=k, geometry=geometry)
    present = {slot: t for slot, t in zip(SLOTS, tensors, strict=False) if t is not None}
    slots = Slots.of(find(name).unpack(present, ask), weight, "", n, hadamard)
    with torch.autocast(dy.device.type, enabled=False):
        return conv_reference.conv2d_grad(dy, slots, geometry, k, (height, width))


ops._library.impl("conv2d", _conv2d, "CompositeExplicitAutograd")
ops._library.impl("conv2d_grad", _conv2d_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("qgen::conv2d")
def _(x, *args):
    *_, n, k, _, size, stride, padding, dilation, _ = args
    geometry = Geometry(*map(tuple, (size, stride, padding, dilation)))
    check(x, k, geometry)
    height, width = geometry.output(*x.shape[2:])
    return x.new_empty((x.shape[0], height, width, n)).permute(0, 3, 1, 2)


@torch.library.register_fake("qgen::conv2d_grad")
def _(dy, *args):
    *_, k, _, size, _, _, _, _, height, width = args
    return dy.new_empty((dy.shape[0], k // (size[0] * size[1]), height, width))


def _setup(ctx, inputs, output):
    x, *rest = inputs
    ctx.save_for_backward(*rest[:7])
    weight, _, n, k, hadamard, *geometry = rest[10:]
    ctx.rest = (weight, n, k, hadamard, *geometry, x.shape[2], x.shape[3])


def _backward(ctx, dy):
    dx = torch.ops.qgen.conv2d_grad(dy, *ctx.saved_tensors, *ctx.rest)
    return (dx, *[None] * 20)


torch.library.register_autograd("qgen::conv2d", _backward, setup_context=_setup)

conv2d = torch.ops.qgen.conv2d
