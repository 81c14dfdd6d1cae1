r"""What methods that learn roundings share: a target in units of its steps, the two grid points next to each weight, and the loss.

Everything after the rounding of activations is linear, so that the squared error of the output over all calibration rows is

    L(Q) = Σ_n E_n H E_nᵀ,    E = W − Q,    ∂L/∂Q = −2 E H

with H as in GPTQ. No rows are kept and no graph is built: memory is a few times the weight, whatever the number of prompts.
"""

__all__ = ["Grid", "adam"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import NumberFormat, QTensor, packing
from qgen.formats.base import _grid
from qgen.methods.base import Stats
from qgen.methods.gptq import hessian
from qgen.site import Draft


@dataclass(frozen=True)
class Grid:
    """A target W (N, Kp) and the grid of its format, scales fixed.

    base: the target rounded to nearest. units: W in steps, as the element sees it. low, high: its neighbours on the grid (equal where W is
    on the grid or beyond its end). step: (N, Kp) value of one unit. gram: H.
    """

    target: Tensor
    fmt: NumberFormat
    base: QTensor
    units: Tensor
    low: Tensor
    high: Tensor
    step: Tensor
    gram: Tensor

    @classmethod
    def of(cls, draft: Draft, stats: Stats) -> "Grid | None":
        """The grid of a draft; None for formats whose values are not a table times a step."""
        fmt, target = formats.get(draft.spec.weight), draft.target()
        if not fmt.plain:
            return None
        base = fmt.quantize(target, draft.clip)
        units = fmt.normalize(target, base.scales, base.global_scale, base.zero)
        low, high = neighbours(fmt, units)
        step = fmt.step(base.scales, base.global_scale)[..., None].expand(*fmt.blocks(units).shape).flatten(-2)
        return cls(target, fmt, base, units, low, high, step, hessian(draft, stats))

    def values(self, units: Tensor) -> Tensor:
        """Units (N, Kp), on the grid or between its points, to weights."""
        return self.fmt.scaled(units, self.base.scales, self.base.global_scale, self.base.zero)

    def pull(self, values: Tensor) -> tuple[Tensor, float]:
        """E H (N, Kp), half of the loss's gradient with its sign turned, and the loss itself."""
        error = self.target - values
        back = error @ self.gram
        return back, float((back * error).sum())

    def coded(self, units: Tensor) -> QTensor:
        """The QTensor of units that are on the grid."""
        return replace(self.base, codes=packing.pack(self.fmt.element.encode(units), self.fmt.bits))


def neighbours(fmt: NumberFormat, units: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of the element's grid that is not above, and the smallest that is not below; its ends beyond it."""
    values = _grid(fmt.element, units.device)[0]
    at = torch.bucketize(units.contiguous(), values, right=True)  # values[at - 1] <= units
    low = values[(at - 1).clamp_min(0)]
    high = torch.where(low == units, low, values[at.clamp_max(len(values) - 1)])
    return torch.where(at == 0, values[0], low), high


class adam:
    """Adam for one tensor and gradients that are computed by hand. Kingma and Ba, 2014, https://arxiv.org/abs/1412.6980"""

    def __init__(self, like: Tensor, rate: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.rate, self.betas, self.count = rate, betas, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, x: Tensor, grad: Tensor) -> None:
        """x ← x − rate · m̂ / (√v̂ + ε), in place."""
        b, c = self.betas
        self.count += 1
        self.mean.mul_(b).add_(grad, alpha=1 - b)
        self.square.mul_(c).addcmul_(grad, grad, value=1 - c)
        root = (self.square / (1 - c**self.count)).sqrt_().add_(1e-12)
        x.addcdiv_(self.mean, root, value=-self.rate / (1 - b**self.count))
