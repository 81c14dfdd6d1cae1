r"""Structural similarity: agreement of local means, contrasts and patterns, 1 for equal pictures.

    ssim = mean over positions of (2 μx μy + c1)(2 σxy + c2) / ((μx² + μy² + c1)(σx² + σy² + c2)),   c = (0.01², 0.03²)

with a Gaussian window of σ = 1.5 pixels, per colour channel, over all positions (borders are mirrored, as in
torchmetrics; scikit-image leaves five pixels out). Wang et al., 2004, https://doi.org/10.1109/TIP.2003.819861
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs, same_shape

__all__ = ["ssim"]


def ssim(pictures: Tensor, reference: Tensor, batch_size: int = 16) -> Tensor:
    """Returns (n,) similarities for two tensors (n, H, W, 3) in [0, 1].

    Raises ValueError if shapes differ or a side is shorter than the window of 11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    same_shape(pictures, reference)
    if min(pictures.shape[1:3]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11, found {pictures.shape[1]} x {pictures.shape[2]}")
    pairs = zip(batches(pictures, batch_size), batches(reference, batch_size), strict=True)
    measure = structural_similarity_index_measure
    values = [
        # In float64, since variances of flat areas are small differences. One picture comes back without its batch axis.
        measure(
            x.movedim(-1, 1).double(), y.movedim(-1, 1).double(), data_range=1.0, sigma=1.5, reduction="none"
        ).reshape(len(x))
        for x, y in pairs
    ]
    return torch.cat(values).float()


@metrics.register("ssim")
@needs("reference")
def score_ssim(shots: Shots) -> Measured:
    values = ssim(shots.pictures, shots.need_reference("ssim"), shots.batch_size)
    return Measured("SSIM", "", "higher", per_prompt=values)
