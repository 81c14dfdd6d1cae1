r"""Signal-to-quantization-noise ratio: how many decibels the error lies below the signal.

    sqnr_db = 10 log10( Σ x² / Σ (x - x̂)² )

Unlike cosine similarity it sees a wrong scale. Six decibels are one bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["sqnr_db"]


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """Returns the ratio in dB over all elements of two tensors of one shape, accumulated in float64.

    Equal tensors give infinity, also where both are zero; a zero reference with any error gives minus infinity.
    Raises ValueError for unequal shapes.
    """
    if reference.shape != quantized.shape:
        raise ValueError(f"shapes differ: reference {tuple(reference.shape)}, quantized {tuple(quantized.shape)}")
    x, y = reference.detach().double(), quantized.detach().double()
    noise, signal = float((x - y).square().sum()), float(x.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@metrics.register("sqnr")
@needs("reference")
def score_sqnr(shots: Shots) -> Measured:
    """Per prompt, over the picture's values in [0, 1]."""
    pairs = zip(shots.need_reference("sqnr"), shots.pictures, strict=True)
    return Measured("SQNR", "dB", "higher", per_prompt=torch.tensor([sqnr_db(x, y) for x, y in pairs]))
