r"""Tables over timesteps as few curves: a layer's input moves along a line or two as sampling goes on, not to a new place at each step.

    c_b = Σ_r m_br s_r,     d_b = Σ_r m_br e_r        R curves m over the bins b, and what they multiply: s (R, K), e (R, N)

A table with a row for each bin costs as much as so many ranks of the low-rank branch; its curves cost R, and bins may then be as fine as
the timesteps of a run. `curved` draws a table to so many curves about its mean, `factored` writes a pair of tables as what they have in
common, without loss.
"""

__all__ = ["Factored", "curved", "factored"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ZERO = 1e-5  # of a table's norm: singular values below it are the rounding of float32


@dataclass(frozen=True)
class Factored:
    """mix: (T, R) float32, the largest of each column 1. shift: (S, K) in the storage dtype, or None; its rows go with the last S columns
    of mix. bias: (R, N) float32."""

    mix: Tensor
    shift: Tensor | None
    bias: Tensor


def curved(table: Tensor, weights: Tensor, curves: int) -> Tensor:
    """The table (T, D) with its rows' deviations from the last one, which stands for all bins, drawn to the best `curves` of them.

    weights: (T - 1,) >= 0, rows of data behind each bin.
    """
    whole, root = table[-1:], weights.double().clamp_min(0).sqrt()[:, None].to(table.device)
    u, s, vh = torch.linalg.svd((table[:-1] - whole).double() * root, full_matrices=False)
    kept = (u[:, :curves] * s[:curves]) @ vh[:curves] / root.clamp_min(1e-12)
    return torch.cat([whole + torch.where(root > 0, kept, 0.0).to(table), whole])


def factored(
    shift: Tensor | None, bias_of: Callable[[Tensor | None], Tensor], dtype: torch.dtype, itemsize: int
) -> Factored | None:
    """The tables as curves, where that takes less memory; None where it does not.

    shift: (T, K) float32 or None. bias_of: the bias (T, N) float32 that belongs to the shift as it will be stored, (T, K) or None. dtype:
    of the stored shift; itemsize: bytes of a stored value of the bias.
    """
    moving, rows = None, None
    if shift is not None:
        moving, rows = _basis(shift, float(shift.norm()))
        top, peak = torch.finfo(dtype).max, _peak(moving)
        rows = (rows * peak[:, None]).clamp(-top, top).to(dtype)
    bias = bias_of(None if rows is None else (moving / peak) @ rows.float())
    beside = bias if moving is None else bias - moving @ (moving.T @ bias)
    resting, _ = _basis(beside, float(bias.norm()), least=0 if moving is not None else 1)
    mix = resting if moving is None else torch.cat([resting, moving], 1)  # orthonormal
    bins, columns = mix.shape
    before = bins * ((0 if shift is None else shift.shape[1] * dtype.itemsize) + bias.shape[1] * itemsize)
    stored = 0 if rows is None else rows.numel() * dtype.itemsize
    after = 4 * mix.numel() + stored + columns * bias.shape[1] * itemsize
    peak = _peak(mix)  # rows are then no larger than the tables', so that 16 bits hold them
    return Factored((mix / peak).contiguous(), rows, (mix.T @ bias) * peak[:, None]) if after < before else None


def _peak(columns: Tensor) -> Tensor:
    """Largest magnitude of each column, (R,)."""
    return columns.abs().amax(0)


def _basis(table: Tensor, norm: float, least: int = 1) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (T, R) and rows (R, D) with columns · rows = table, float32, R >= least; below `_ZERO` · norm is nothing."""
    u, s, vh = torch.linalg.svd(table.double(), full_matrices=False)
    rank = max(least, int((s > _ZERO * norm).sum()))
    return u[:, :rank].float(), (s[:rank, None] * vh[:rank]).float()
