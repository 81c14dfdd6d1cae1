"""QuantConv1d and QuantConv3d: convolutions over time, and over time and space, as linear layers over unfolded patches.

x (B, C, L…) is padded and cut into patches (B, P, K), K = channels · kernel sizes in the order of the flattened weight; the linear op does
the rest. A kernel of (3, 1, 1), as in video UNets, makes patches three times the size of the input.
"""

__all__ = ["QuantConv1d", "QuantConv3d", "unfold_nd"]

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qgen.nn.linear import slots_of
from qgen.nn.packed import Layout, Packed, counts_of
from qgen.site import Draft


class _Unfolded(Packed):
    """What both share; subclasses add `nn.Conv1d` or `nn.Conv3d`."""

    float_kind: type

    def __new__(cls, like=None, *args, **kwargs):
        # peft makes the convolutions of an adapter by type(layer)(channels, …): those are ordinary ones.
        return cls.float_kind(like, *args, **kwargs) if isinstance(like, int) else super().__new__(cls)

    def __init__(self, like: Any, layout: Layout, dtype: torch.dtype, device: str = "meta"):
        """An empty layer with the geometry of `like`. ValueError for grouped or non-zero-padded convolutions."""
        if like.groups != 1 or like.padding_mode != "zeros" or isinstance(like.padding, str):
            raise ValueError(f"only convolutions with one group and zero padding can be packed, found {like}")
        n, k = like.out_channels, like.in_channels * math.prod(like.kernel_size)
        self._setup(n, k, layout.weight, layout.act, layout.hadamard, dtype)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
            "transposed", "output_padding", "_reversed_padding_repeated_twice",
        ):  # fmt: skip
            setattr(self, name, getattr(like, name))
        self.fill(layout.empty(n, k, dtype, device))

    @classmethod
    def from_draft(cls, draft: Draft, like: Any, index: int = 0, dtype: torch.dtype = torch.bfloat16) -> "_Unfolded":
        """The layer of the draft's site number `index`, with the geometry of `like`."""
        slots = slots_of(draft, index, dtype)
        rank = 0 if draft.down is None else draft.down.shape[0]
        layer = cls(
            like, Layout(draft.spec.weight, draft.act, rank, draft.hadamard, tuple(slots), **counts_of(slots)), dtype
        )
        layer.fill(slots)
        return layer

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        batched = input if input.ndim == len(self.kernel_size) + 2 else input[None]  # one sample, as torch allows
        patches, size = unfold_nd(batched, self)
        y = self._run(patches).mT.reshape(len(batched), self.n, *size)
        return y if batched is input else y[0]


class QuantConv1d(_Unfolded, nn.Conv1d):
    """A packed `nn.Conv1d` with one group and zero padding: x (B, C, L) to (B, N, L') in x's dtype."""

    float_kind = nn.Conv1d


class QuantConv3d(_Unfolded, nn.Conv3d):
    """A packed `nn.Conv3d` with one group and zero padding: x (B, C, T, H, W) to (B, N, T', H', W') in x's dtype."""

    float_kind = nn.Conv3d


def unfold_nd(x: Tensor, conv: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Patches (B, P, K) of x (B, C, L…) that a convolution multiplies with its weight (N, K), and the sizes whose product is P."""
    x = F.pad(x, [p for p in reversed(conv.padding) for _ in range(2)])
    for axis, (size, stride, step) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * step + 1, stride)[..., ::step]  # one more axis at the end: the kernel's
    count = len(conv.kernel_size)
    sizes = tuple(x.shape[2 : 2 + count])
    x = x.permute(0, *range(2, 2 + count), 1, *range(2 + count, 2 + 2 * count))
    return x.reshape(len(x), math.prod(sizes), conv.in_channels * math.prod(conv.kernel_size)), sizes
