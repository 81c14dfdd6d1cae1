r"""Perceptual distance: how far two pictures are for a network that has learned to see, 0 for equal pictures.

    lpips = Σ over depths l   mean over positions   Σ over channels c   w_lc (x̂_lc - ŷ_lc)²

x̂ and ŷ are the network's features at depth l, scaled to unit length over the channels at every position. LPIPS proper
takes AlexNet (or VGG, SqueezeNet) and weights w fitted to human judgement. Over another network, with w = 1, the same
formula is a perceptual distance of its own scale; it is then named after that network and not comparable with LPIPS.

Zhang et al., 2018, https://arxiv.org/abs/1801.03924
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs, same_shape

__all__ = ["lpips", "perceptual_distance"]


def perceptual_distance(
    maps_x: Sequence[Tensor], maps_y: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Returns (B,) distances by the formula above, for features (B, C_l, H_l, W_l) and weights (C_l,) at each depth l.

    Without weights they are 1 everywhere.
    """
    weights = [torch.ones(x.shape[1], device=x.device) for x in maps_x] if weights is None else weights
    total = torch.zeros(len(maps_x[0]), device=maps_x[0].device)
    for x, y, w in zip(maps_x, maps_y, weights, strict=True):
        squares = (_unit(x.float()) - _unit(y.float())).square()
        total = total + (squares * w[:, None, None]).sum(1).mean((1, 2))
    return total


def lpips(pictures: Tensor, reference: Tensor, extractor, batch_size: int = 16) -> Tensor:
    """Returns (n,) distances for two tensors (n, H, W, 3) in [0, 1]; `extractor` has `distance(x, y) -> (B,)`."""
    same_shape(pictures, reference)
    pairs = zip(batches(pictures, batch_size), batches(reference, batch_size), strict=True)
    return torch.cat([extractor.distance(x, y).float().cpu() for x, y in pairs])


@metrics.register("lpips")
@needs("reference", "network")
def score_lpips(shots: Shots) -> Measured:
    reference = shots.need_reference("lpips")
    extractor = shots.extractor_for("lpips")
    values = lpips(shots.pictures, reference, extractor, shots.batch_size)
    return Measured(extractor.labels["lpips"], "", "lower", per_prompt=values, extractor=extractor)


def _unit(x: Tensor) -> Tensor:
    # 1e-10 under the root as well: where all channels are zero (after a ReLU) the length has no direction.
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()
