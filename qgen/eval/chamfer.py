r"""Chamfer distance of two point clouds: mean distance to the nearest point of the other, both ways averaged.

    chamfer = ½ ( mean_i min_j |a_i - b_j| + mean_j min_i |a_i - b_j| )

The two halves are accuracy and completeness. Clouds are compared in the coordinates in which they come: no alignment.
Jensen et al., 2014 (DTU), https://doi.org/10.1109/CVPR.2014.59
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chamfer"]


def chamfer(a: Tensor, b: Tensor, rows: int = 4096) -> float:
    """In the clouds' own unit, for points (P, 3) and (Q, 3); rows: how many are compared at once. Points that are not finite are left out.

    Raises ValueError for other shapes, or a cloud without points.
    """
    clouds = []
    for x in (a, b):
        if x.ndim != 2 or x.shape[1] != 3:
            raise ValueError(f"points (P, 3) wanted, found {tuple(x.shape)}")
        clouds.append(x.double()[x.isfinite().all(1)])
        if not len(clouds[-1]):
            raise ValueError("a point cloud holds no finite point")
    return 0.5 * sum(_one_way(x, y, rows) for x, y in (clouds, clouds[::-1]))


def _one_way(a: Tensor, b: Tensor, rows: int) -> float:
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product loses half the digits near zero
    nearest = [torch.cdist(part, b, compute_mode=exact).min(1).values for part in a.split(rows)]
    return float(torch.cat(nearest).mean())
