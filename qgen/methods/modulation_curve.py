r"""A low-rank curve over time in the place of a module that depends on the timestep alone: m(t) ≈ mean + Σ_r c_r(t) v_r.

Modulations are smooth in t and move in few directions; a handful of curves holds them for every scheduler, at a small part of the weights.
Curves are exact at their knots up to the rank, and linear between them; what they are off there is measured before they are trusted.
Caching temporal features: Huang et al., 2024, https://arxiv.org/abs/2407.19547
"""

__all__ = ["Curve", "Table"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor


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

    def serves(self, t: Tensor) -> bool:
        """Whether all of timesteps t (B,) lie within the knots."""
        return bool(((t >= self.knots[0]) & (t <= self.knots[-1])).all())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.knots, self.coefficients, self.basis, self.mean))

    def disturbance(self, t: Tensor, values: Tensor) -> float:
        """Relative squared error at timesteps t (n,) whose true values (n, D) are known: what decides between curve and layer."""
        return float((self(t) - values.float()).square().sum() / values.float().square().sum().clamp_min(1e-30))


@dataclass(frozen=True)
class Table:
    """m(t) (D,) at the timesteps of one schedule, rounded to a number format: knots (n,) ascending, values (n, D)."""

    knots: Tensor
    values: QTensor

    @classmethod
    def fit(cls, t: Tensor, values: Tensor, numbers: str) -> "Table":
        """From values (n, D) at timesteps t (n,)."""
        order = t.float().argsort()
        return cls(t.float()[order], formats.get(numbers).quantize(values.float()[order]))

    def __call__(self, t: Tensor) -> Tensor:
        """Values (B, D) float32 at timesteps t (B,), each of which is one of the table's."""
        return self.values.dequantize()[torch.searchsorted(self.knots, t.float())]

    def serves(self, t: Tensor) -> bool:
        """Whether all of timesteps t (B,) are in the table."""
        return bool(torch.isin(t.float(), self.knots).all())

    @property
    def nbytes(self) -> int:
        return self.knots.nbytes + self.values.nbytes
