"""QuantConv2d: a convolution as a linear layer over unfolded patches, K = channels · kernel height · kernel width."""

__all__ = ["QuantConv2d", "unfold"]

import torch
from torch import Tensor, nn

from qgen.kernels import conv_ops, conv_reference
from qgen.kernels.conv_ops import ConvAsk, Geometry
from qgen.kernels.ops import SLOTS
from qgen.kernels.registry import Kernel
from qgen.nn.linear import slots_of
from qgen.nn.packed import Layout, Packed, counts_of
from qgen.site import Draft


class QuantConv2d(Packed, nn.Conv2d):
    """A packed `nn.Conv2d` with one group and zero padding: x (B, C, H, W) to (B, N, H', W') in x's dtype, channels-last in memory."""

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
            draft.spec.weight,
            draft.act,
            0 if draft.down is None else draft.down.shape[0],
            draft.hadamard,
            tuple(slots),
            **counts_of(slots),
        )
        layer = cls(like, layout, dtype)
        layer.fill(slots)
        return layer

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.n, self.in_channels, *self.kernel_size)

    def ask(self) -> ConvAsk:
        """This layer's request to the kernel registry, for the device where its codes are."""
        conv_ops.offer()
        return ConvAsk(**{**vars(super().ask()), "op": "conv2d"}, geometry=Geometry.of(self))

    def found(self, kernel: str) -> Kernel:
        """The kernel of this name, of the op that the layer runs."""
        return conv_ops.find(kernel)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input[None])[0] if input.ndim == 3 else self._run(input)  # one sample, as torch allows

    def _product(self, x: Tensor, kernel: str) -> Tensor:
        return torch.ops.qgen.conv2d(
            x, *[getattr(self, slot) for slot in SLOTS], self.weight_format, self.act_format, self.n, self.k,
            self.hadamard, self.kernel_size, self.stride, self.padding, self.dilation, kernel,
        )  # fmt: skip


def unfold(x: Tensor, conv: nn.Conv2d) -> tuple[Tensor, int, int]:
    """Patches (B, H' · W', K) that a convolution multiplies with its weight (N, K), and H', W'."""
    geometry = Geometry.of(conv)
    return conv_reference.unfold(x, geometry), *geometry.output(*x.shape[2:])
