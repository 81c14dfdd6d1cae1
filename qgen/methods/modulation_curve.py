r"""A low-rank curve over time in the place of a module that depends on the timestep alone: m(t) ≈ mean + Σ_r c_r(t) v_r.

Modulations are smooth in t and move in few directions; a handful of curves holds them for every scheduler, at a small part of the weights.
Curves are exact at their knots up to the rank, and linear between them; what they are off there is measured before they are trusted.
Caching temporal features: Huang et al., 2024, https://arxiv.org/abs/2407.19547
"""

__all__ = ["Curve"]

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """m(t) (D,) as a low-rank curve: knots (n,) ascending, coefficients (n, R) linear between them, basis (R, D), mean (D,)."""

    knots: Tensor
    coefficients: Tensor
    basis: Tensor
    mean: Tensor

    @classmethod
    def fit(cls, t: Tensor, values: Tensor, rank: int) -> "Curve":
        """From values (n, D) at timesteps t (n,): the best of this rank at the knots (Eckart and Young). ValueError for equal timesteps."""
        order = t.float().argsort()
        t, values = t.float()[order], values.float()[order]
        if len(t) < 2 or not bool((t.diff() > 0).all()):
            raise ValueError(
                f"a curve needs at least two different timesteps, found {len(t)}, {len(t.unique())} different"
            )
        mean = values.mean(0)
        u, s, vh = torch.linalg.svd(values - mean, full_matrices=False)
        rank = min(rank, len(s))
        return cls(t, u[:, :rank] * s[:rank], vh[:rank], mean)

    def __call__(self, t: Tensor) -> Tensor:
        """Values (B, D) float32 at timesteps t (B,); beyond the knots, those of the outermost."""
        t = t.float().clamp(self.knots[0], self.knots[-1])
        high = torch.bucketize(t, self.knots).clamp(1, len(self.knots) - 1)
        left, right = self.knots[high - 1], self.knots[high]
        w = ((t - left) / (right - left))[:, None]
        return torch.lerp(self.coefficients[high - 1], self.coefficients[high], w) @ self.basis + self.mean

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.knots, self.coefficients, self.basis, self.mean))

    def disturbance(self, t: Tensor, values: Tensor) -> float:
        """Relative squared error at timesteps t (n,) whose true values (n, D) are known: what decides between curve and layer."""
        return float((self(t) - values.float()).square().sum() / values.float().square().sum().clamp_min(1e-30))
