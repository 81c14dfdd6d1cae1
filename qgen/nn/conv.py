"""QuantConv2d: a convolution as a linear layer over unfolded patches, K = channels · kernel height · kernel width."""

__all__ = ["QuantConv2d", "unfold"]

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qgen.nn.linear import slots_of
from qgen.nn.packed import Layout, Packed
from qgen.site import Draft


class QuantConv2d(Packed, nn.Conv2d):
    """A packed `nn.Conv2d` with one group and zero padding: x (B, C, H, W) to (B, N, H', W') in x's dtype."""

    def __new__(cls, like=None, *args, **kwargs):
        # peft makes the convolutions of an adapter by type(layer)(channels, …): those are ordinary ones.
        return nn.Conv2d(like, *args, **kwargs) if isinstance(like, int) else super().__new__(cls)

    def __init__(self, like: nn.Conv2d, layout: Layout, dtype: torch.dtype, device: str = "meta"):
        """An empty layer with the geometry of `like`. ValueError for grouped or non-zero-padded convolutions."""
        if like.groups != 1 or like.padding_mode != "zeros" or isinstance(like.padding, str):
            raise ValueError(f"only convolutions with one group and zero padding can be packed, found {like}")
        n, k = like.out_channels, like.in_channels * like.kernel_size[0] * like.kernel_size[1]
        self._setup(n, k, layout.weight, layout.act, layout.hadamard, dtype)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
            "transposed", "output_padding", "_reversed_padding_repeated_twice",
        ):  # fmt: skip
            setattr(self, name, getattr(like, name))
        self.fill(layout.empty(n, k, dtype, device))

    @classmethod
    def from_draft(
        cls, draft: Draft, like: nn.Conv2d, index: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> "QuantConv2d":
        """The layer of the draft's site number `index`, with the geometry of `like`."""
        slots = slots_of(draft, index, dtype)
        layout = Layout(
            draft.spec.weight, draft.act, 0 if draft.down is None else draft.down.shape[0], draft.hadamard, tuple(slots)
        )
        layer = cls(like, layout, dtype)
        layer.fill(slots)
        return layer

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, height, width = unfold(x, self)
        y = self._run(rows)  # (B, H' · W', N)
        return y.transpose(1, 2).unflatten(2, (height, width))


def unfold(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, int, int]:
    """Patches (B, H' · W', K) that a convolution multiplies with its weight (N, K), and H', W'."""
    sizes = [
        (x.shape[2 + i] + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel_size[i] - 1) - 1) // conv.stride[i] + 1
        for i in (0, 1)
    ]
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
        return x.flatten(2).transpose(1, 2), *sizes
    rows = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return rows.transpose(1, 2), *sizes
