r"""DISTS-like: structure and texture compared over a network's features, tolerant of resampled texture.

    d = 1 - mean over depths l, mean over channels c of ½ [ texture + structure ]
    texture   = (2 μx μy + ε) / (μx² + μy² + ε)          structure = (2 σxy + ε) / (σx² + σy² + ε)

μ, σ² and σxy are taken over all positions of one channel of one depth; depth 0 is the picture itself; ε = 1e-6. DISTS
proper weighs the channels of VGG16 by numbers fitted to human judgement, which do not come with any package. Here
every depth, and every channel within it, weighs the same: the row is called DISTS-like and names its network.

Ding, Ma, Wang & Simoncelli, 2020, https://arxiv.org/abs/2004.07728
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs, same_shape

__all__ = ["structure_texture_distance"]

EPSILON = 1e-6


def structure_texture_distance(maps_x: Sequence[Tensor], maps_y: Sequence[Tensor]) -> Tensor:
    """Returns (B,) distances by the formula above for features (B, C_l, H_l, W_l) at each depth l; 0 for equal ones."""
    depths = []
    for x, y in zip(maps_x, maps_y, strict=True):
        x, y = x.double().flatten(2), y.double().flatten(2)  # (B, C, positions)
        mx, my = x.mean(2), y.mean(2)
        vx, vy = x.var(2, correction=0), y.var(2, correction=0)
        vxy = (x * y).mean(2) - mx * my
        texture = (2 * mx * my + EPSILON) / (mx**2 + my**2 + EPSILON)
        structure = (2 * vxy + EPSILON) / (vx + vy + EPSILON)
        depths.append((texture + structure).mean(1) / 2)
    return (1 - torch.stack(depths).mean(0)).float()


def dists(pictures: Tensor, reference: Tensor, extractor, batch_size: int = 16) -> Tensor:
    """Returns (n,) distances for two tensors (n, H, W, 3) in [0, 1]; `extractor` has `maps((B, H, W, 3))`."""
    same_shape(pictures, reference)
    found = []
    for x, y in zip(batches(pictures, batch_size), batches(reference, batch_size), strict=True):
        mine, theirs = ([p.movedim(-1, 1), *(m.cpu() for m in extractor.maps(p))] for p in (x, y))
        found.append(structure_texture_distance(mine, theirs))
    return torch.cat(found)


@metrics.register("dists")
@needs("reference", "network")
def score_dists(shots: Shots) -> Measured:
    extractor = shots.extractor_for("dists")
    values = dists(shots.pictures, shots.need_reference("dists"), extractor, shots.batch_size)
    return Measured(extractor.labels["dists"], "", "lower", per_prompt=values, extractor=extractor)
