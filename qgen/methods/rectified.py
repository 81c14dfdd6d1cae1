r"""The rectified sigmoid: a rounding between down (0) and up (1) that gradients can move, and that comes to rest at its ends.

    h(a) = clamp(sigmoid(a) (ζ − γ) + γ, 0, 1),    ζ = 1.1, γ = −0.1,        pull to the ends:  Σ (1 − |2h − 1|^β)

β falls from 20, where only values next to an end are pulled, to 2, where all are.
Nagel et al., 2020, https://arxiv.org/abs/2004.10568
"""

__all__ = ["GAMMA", "ZETA", "beta", "place", "rectified"]

import torch
from torch import Tensor

GAMMA, ZETA = -0.1, 1.1


def rectified(a: Tensor) -> Tensor:
    """h(a), in [0, 1]."""
    return (torch.sigmoid(a) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def place(h: Tensor) -> Tensor:
    """a with h(a) = h, for h in (0, 1)."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def beta(done: float, warm: float) -> float | None:
    """β at a share `done` of the steps; None in the first `warm` of them, which run without the pull."""
    return None if done < warm else 20 - 18 * (done - warm) / max(1 - warm, 1e-9)
