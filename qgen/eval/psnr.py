r"""Peak signal-to-noise ratio of each picture against its reference.

    psnr = 10 log10( 1 / mean (x - y)² )        values in [0, 1]

The mean over pictures of each picture's own ratio, as is usual in papers on quantized diffusion. It compares a
picture with *the same* picture of the 16-bit model: two good pictures of one prompt may still be far apart, so a low
value alone is not bad quality.
"""

from __future__ import annotations

from torch import Tensor

from qgen.eval.metrics import Measured, Shots, metrics, needs, same_shape

__all__ = ["psnr"]


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Returns (n,) decibels for two tensors (n, H, W, 3) in [0, 1]; infinite where equal.

    Raises ValueError if shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    same_shape(pictures, reference)
    return peak_signal_noise_ratio(pictures, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))


@metrics.register("psnr")
@needs("reference")
def score_psnr(shots: Shots) -> Measured:
    return Measured("PSNR", "dB", "higher", per_prompt=psnr(shots.pictures, shots.need_reference("psnr")))
