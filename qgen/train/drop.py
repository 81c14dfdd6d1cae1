r"""Drop: in training, each element of a layer's rounded input is left unrounded with probability p.

    x̂ = x where u < p, Q(x) elsewhere,    u ~ U(0, 1)

Roundings of weights that are learned behind always rounded inputs fit these inputs; behind inputs that are rounded here and there they
are right in a whole neighbourhood, and so on inputs that were not seen.
QDrop, Wei et al., 2022, https://arxiv.org/abs/2203.05740
"""

__all__ = ["Drop"]

import hashlib

import torch
from torch import Tensor


class Drop:
    """share: p. moment: what the draw depends on beside the layer's path, such as seed, step and call; None = nothing is dropped."""

    def __init__(self, share: float):
        self.share = share
        self.moment: tuple | None = None

    def __call__(self, path: str, x: Tensor, rounded: Tensor) -> Tensor:
        """`rounded` (…, K) with a share of its elements from x: the same ones for the same path and moment."""
        if self.moment is None or not self.share:
            return rounded
        word = hashlib.sha256(repr((self.moment, path)).encode()).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(word[:6], "little"))
        return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < self.share, x, rounded)
