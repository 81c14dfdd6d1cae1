r"""Multi-scale SSIM: structural similarity at full size, half, quarter, …, so that neither fine nor coarse errors hide.

    ms_ssim = l_M^{w_M} · Π_j cs_j^{w_j}

cs_j is the mean contrast-structure term after halving the picture j - 1 times (2 x 2 means), l_M the whole SSIM at the
coarsest. Five scales need a shorter side of 176 pixels for the window of 11; smaller pictures take as many scales as
fit, with the first weights rescaled to sum 1, and the row says how many. Negative terms are cut at zero.

Wang, Simoncelli & Bovik, 2003, https://doi.org/10.1109/ACSSC.2003.1292216
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs, same_shape

__all__ = ["ms_ssim", "scales_that_fit"]

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Table 1 of the paper
SIDE, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def scales_that_fit(height: int, width: int) -> int:
    """How many of the five scales leave the shorter side at least as long as the window; 0 for less than 11 pixels."""
    return sum(min(height, width) >> j >= SIDE for j in range(len(WEIGHTS)))


def ms_ssim(pictures: Tensor, reference: Tensor, batch_size: int = 16) -> Tensor:
    """Returns (n,) similarities for two tensors (n, H, W, 3) in [0, 1], 1 for equal ones.

    Raises ValueError if shapes differ or a side is shorter than 11 pixels.
    """
    same_shape(pictures, reference)
    count = scales_that_fit(*pictures.shape[1:3])
    if count == 0:
        raise ValueError(f"MS-SSIM needs pictures of at least 11 x 11, found {pictures.shape[1]} x {pictures.shape[2]}")
    weights = torch.tensor(WEIGHTS[:count], dtype=torch.float64)
    weights = weights / weights.sum()
    pairs = zip(batches(pictures, batch_size), batches(reference, batch_size), strict=True)
    return torch.cat([_batch(x.movedim(-1, 1).double(), y.movedim(-1, 1).double(), weights) for x, y in pairs]).float()


@metrics.register("ms_ssim")
@needs("reference")
def score_ms_ssim(shots: Shots) -> Measured:
    reference = shots.need_reference("ms_ssim")
    values = ms_ssim(shots.pictures, reference, shots.batch_size)
    count = scales_that_fit(*reference.shape[1:3])
    label = "MS-SSIM" if count == len(WEIGHTS) else f"MS-SSIM ({count} of 5 scales)"
    return Measured(label, "", "higher", per_prompt=values)


def _batch(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    result = torch.ones(len(x), dtype=torch.float64)
    for j, weight in enumerate(weights):
        luminance, contrast = _terms(x, y)
        last = j == len(weights) - 1
        term = ((luminance * contrast) if last else contrast).mean((1, 2, 3))
        result = result * term.clamp_min(0) ** weight
        if not last:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps, each (B, 3, h, w), where the window lies inside the picture."""
    mx, my = _blur(x), _blur(y)
    vx, vy, vxy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    return (2 * mx * my + C1) / (mx * mx + my * my + C1), (2 * vxy + C2) / (vx + vy + C2)


def _blur(x: Tensor) -> Tensor:
    line = torch.arange(SIDE, dtype=x.dtype) - SIDE // 2
    line = (-0.5 * (line / SIGMA) ** 2).exp()
    line = (line / line.sum()).expand(x.shape[1], 1, 1, SIDE)
    across = F.conv2d(x, line, groups=x.shape[1])
    return F.conv2d(across, line.movedim(-1, -2), groups=x.shape[1])
