r"""Balance: smoothing factors fitted by gradient descent on a model of both rounding errors, from `s_j = (max|x_j| / max|w_j|)^½`.

A block of range r, rounded to a format, gets a mean square error of about κ r², with one κ per format. For the residual R = Ŵ − U D of the
smoothed weight and inputs x̂ = x / s the error of the output is therefore about

    Σ_blocks  κ_a E[r(x̂_b)²] ‖R_b‖²  +  κ_w Σ_n r(R_nb)² E‖x̂_b‖²

which is smooth in log s almost everywhere and needs no rounding at all: a few dozen steps on a sample of rows and outputs move each channel
by itself, where a grid moves all of them along one curve. The branch U D is refitted on the way. What is found stays only where it lowers
the error on held-out rows. The idea of learning smoothing by descent is OmniQuant's, Shao et al., 2023,
https://arxiv.org/abs/2308.13137; there through the rounding of whole blocks, here through this model.
"""

__all__ = ["Balance", "noise_of", "ranges"]

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from qgen import formats
from qgen.formats import NumberFormat
from qgen.kernels import reference
from qgen.methods.base import Stats
from qgen.methods.lowrank import LowRank, low_rank
from qgen.methods.smooth import factors, pick
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("balance")
@dataclass(frozen=True)
class Balance:
    """Lowers the modelled error of the output, and the real one on held-out rows. Stands in the place of `smooth`, or after it.

    steps: of Adam. rate: its first step size in log s, falling to 0. values: about so many numbers are in the model, a third of them inputs
    (96 to 256 rows), the rest weights. refresh: steps between refits of the branch. judge_rows: at most so many rows decide whether the
    result stays.
    """

    name: ClassVar[str] = "balance"
    of_inputs: ClassVar[bool] = True
    steps: int = 30
    rate: float = 0.05
    values: int = 1 << 19
    refresh: int = 15
    judge_rows: int = 256

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "absmax"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        tokens = min(256, max(96, self.values // (3 * draft.weight.shape[1])))
        start = draft.smooth
        if start is None:
            start = factors(stats.absmax, draft.weight.abs().amax(0), 0.5, 0.5)
        with torch.inference_mode(False), torch.enable_grad():
            bare = replace(draft, down=None, up=None, qweight=None)
            found = self._descend(bare, stats.fit[:tokens].clone(), start.clone())
        return pick(draft, stats, self.judge_rows, [draft.smooth, found])

    def _descend(self, draft: Draft, x: Tensor, start: Tensor) -> Tensor:
        weight, some = draft.weight.clone(), slice(None, None, max(1, len(draft.weight) // (2 * len(x))))
        logs = start.log().clone().requires_grad_()
        adam = torch.optim.Adam([logs], lr=self.rate, betas=(0.9, 0.95))
        fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / self.steps)
        residual = weight[some]
        for step in range(self.steps):
            if step % self.refresh == 0:
                residual = _residual(draft, weight, logs.detach().exp(), some)
            loss = self._model(draft, x, residual, logs.exp()).log()
            adam.zero_grad()
            loss.backward()
            adam.step()
            fall.step()
        return logs.detach().exp().clamp(1e-4, 1e4)

    def _model(self, draft: Draft, x: Tensor, residual: Tensor, smooth: Tensor) -> Tensor:
        w = pad(residual * smooth, (0, draft.k_padded - residual.shape[1]))
        w = reference.hadamard_blocks(w, draft.hadamard) if draft.hadamard else w
        xh = reference.transform_act(x, w.shape[1], smooth, draft.shift, draft.hadamard)
        weights = formats.get(draft.spec.weight)
        loss = noise_of(draft.spec.weight) * _cross(ranges(w, weights), weights.blocks(xh))
        if draft.act:
            acts = formats.get(draft.act)
            loss = loss + noise_of(draft.act) * _cross(ranges(xh, acts), acts.blocks(w))
        return loss + torch.finfo(loss.dtype).tiny  # a layer without weights or inputs has no logarithm


def _residual(draft: Draft, weight: Tensor, smooth: Tensor, some: slice) -> Tensor:
    """Rows of what the branch leaves of the weight, in the raw basis."""
    branch = next((m for m in draft.spec.methods if isinstance(m, LowRank)), None)
    rank = 0 if branch is None else min(branch.rank, min(draft.sites[0].shape) // 4)
    if rank < 1:
        return weight[some]
    up, down = low_rank(weight * smooth, rank, 0, 1)
    return weight[some] - (up[some] @ down) / smooth


def _cross(ranges: Tensor, blocks: Tensor) -> Tensor:
    """Σ_blocks E[range²] · E‖block‖², means over rows: (M, G) and (N, G, block) to ()."""
    return (ranges.square().mean(0) * blocks.square().sum(-1).mean(0)).sum()


def ranges(x: Tensor, fmt: NumberFormat) -> Tensor:
    """(…, K / block): largest magnitude of each block, or max − min where the format has zero points."""
    blocks = fmt.blocks(x)
    if fmt.zero_point:
        return blocks.amax(-1) - blocks.amin(-1)
    return blocks.amax(-1).clamp_min(0) if not fmt.element.signed else blocks.abs().amax(-1)


@lru_cache(maxsize=64)
def noise_of(name: str) -> float:
    """κ: mean square rounding error of normally distributed values in units of their blocks' mean square range."""
    fmt = formats.get(name)
    x = torch.randn(256, fmt.block or 1024, generator=torch.Generator().manual_seed(0))
    x = x if fmt.element.signed or fmt.zero_point else x.abs()
    return float((fmt.fake(x) - x).square().mean() / ranges(x, fmt).square().mean())
