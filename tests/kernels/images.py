"""Random images and quantized convolutions in canonical tensors, and their patches by torch's own unfold."""

__all__ = ["GEOMETRIES", "as_rows", "images", "make_conv", "patches"]

import torch
from layers import make_layer

from qgen.kernels.conv_ops import ConvAsk, Geometry

GEOMETRIES = {
    "3x3": Geometry((3, 3), padding=(1, 1)),
    "1x1": Geometry((1, 1)),
    "3x3_stride2": Geometry((3, 3), (2, 2), (1, 1)),
    "3x1_dilated": Geometry((3, 1), (1, 2), (2, 0), (2, 1)),
    "1x1_stride2": Geometry((1, 1), (2, 2)),
    "1x1_padded": Geometry((1, 1), padding=(1, 0)),
}


def images(channels_last=True, dtype=torch.bfloat16, b=2, c=22, h=9, w=7):
    x = torch.randn(b, c, h, w).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def patches(x, geometry):
    """(M, K)."""
    rows = torch.nn.functional.unfold(
        x.float(), geometry.kernel_size, geometry.dilation, geometry.padding, geometry.stride
    )
    return rows.transpose(1, 2).flatten(0, 1).to(x.dtype)


def make_conv(weight, act, n, c, geometry, dtype=torch.bfloat16, **options):
    """(slots, ask) of a convolution of c channels to n; options as for `make_layer`."""
    slots, ask = make_layer(weight, act, n, c * geometry.taps, dtype, **options)
    return slots, ConvAsk(**{**vars(ask), "op": "conv2d"}, geometry=geometry)


def as_rows(y):
    """(B, N, H, W) to (M, N)."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)
