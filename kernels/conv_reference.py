r"""Quantized convolutions by unfolding: the meaning of `qgen::conv2d`, and how every kernel of the op `linear` serves one.

    y = linear(unfold(x)),      dx = fold(linear_grad(dy))

`unfold` is torch's im2col: rows (B, H' · W', K) whose columns are (channel, kernel row, kernel column), channels slowest. Codes of
activations are those of the rows: a scale per patch, or per block of its K.
"""

__all__ = ["conv2d_grad", "fold", "unfold", "unfolding"]

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen.kernels import reference
from qgen.kernels.conv_ops import Geometry
from qgen.kernels.registry import Kernel
from qgen.kernels.slots import Slots


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches (B, H' · W', K) of images x (B, C, H, W); a view where each is one pixel."""
    if geometry.pointwise:
        return x[:, :, :: geometry.stride[0], :: geometry.stride[1]].flatten(2).transpose(1, 2)
    rows = F.unfold(x, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride)
    return rows.transpose(1, 2)


def fold(rows: Tensor, geometry: Geometry, size: tuple[int, int]) -> Tensor:
    """The transpose of `unfold`: rows (B, H' · W', K), each added where its patch lies, to (B, C, H, W) with (H, W) = size."""
    return F.fold(
        rows.transpose(1, 2), size, geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride
    )


def unfolding(kernel: Kernel) -> Kernel:
    """The kernel of op "conv2d" that unfolds patches for `kernel` of op "linear": its name, needs, priority and layout."""

    def run(x: Tensor, slots: Slots, geometry: Geometry) -> Tensor:
        height, width = geometry.output(*x.shape[2:])
        y = kernel.run(unfold(x, geometry), slots)
        return y.reshape(x.shape[0], height, width, slots.n).permute(0, 3, 1, 2)

    return replace(kernel, op="conv2d", run=run, quantize=None, multiply=None)


def conv2d_grad(dy: Tensor, slots: Slots, geometry: Geometry, k: int, size: tuple[int, int]) -> Tensor:
    """Gradient (B, C, H, W) with respect to x, (H, W) = size, straight through the rounding of activations; canonical slots."""
    rows = dy.flatten(2).transpose(1, 2).float()
    dx = reference.linear_grad(rows, slots, k, "reference")
    return fold(dx, geometry, size).to(dy.dtype).contiguous(memory_format=torch.contiguous_format)
