r"""GPTQ: rounds columns one by one, pushing each column's error into those still unrounded.

Minimizes tr((W − Q) H (W − Q)ᵀ), H = mean of x̂ x̂ᵀ over calibration rows in the basis of the target, with the noise of quantized
activations added to its diagonal. Few prompts make H overfit: several dampings (a multiple of the mean diagonal, added to it) are tried, and
the one with the smallest error on held-out rows is kept. Columns are taken by descending diagonal; scales are fixed before the first one.
Frantar et al., 2022, https://arxiv.org/abs/2210.17323
"""

__all__ = ["GPTQ", "gptq", "hessian"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import NumberFormat, QTensor, packing
from qgen.kernels.reference import hadamard_blocks
from qgen.methods.base import Stats, best
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Lowers the output error on fitted rows; kept only where it lowers the error on held-out rows.

    damps: candidates, as fractions of the mean diagonal of H. block: columns per lazy update.
    """

    name: ClassVar[str] = "gptq"
    optional: ClassVar[bool] = True
    damps: tuple[float, ...] = (0.01, 0.1, 0.5)
    block: int = 128

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        h, target, fmt = hessian(draft, stats), draft.target(), formats.get(draft.spec.weight)
        drafts = [replace(draft, qweight=gptq(target, h, fmt, damp, draft.clip, self.block)).noted(damp=damp) for damp in self.damps]
        return best(drafts, stats.judge)


def hessian(draft: Draft, stats: Stats) -> Tensor:
    """H (Kp, Kp) float32 in the basis of the draft's target, activation rounding noise included."""
    h = stats.gram
    if draft.smooth is not None:
        h = h / draft.smooth / draft.smooth[:, None]
    if draft.k_padded > h.shape[0]:
        extra = draft.k_padded - h.shape[0]
        h = torch.nn.functional.pad(h, (0, extra, 0, extra))
    if draft.hadamard:
        h = hadamard_blocks(hadamard_blocks(h, draft.hadamard).T, draft.hadamard).T
    if draft.act and stats.fit is not None:
        rows = stats.fit[:1024]
        noise = (draft.inputs(rows) - draft.inputs(rows, quantized=False)).square().mean(0)
        h = h + torch.diag(noise)
    return h


def gptq(
    weight: Tensor, gram: Tensor, fmt: NumberFormat, damp: float = 0.01, clip: Tensor | float = 1.0, block: int = 128
) -> QTensor:
    """Codes of `weight` (N, K) for a given second moment `gram` (K, K) of its inputs.

    Arguments:
        weight: float32, already smoothed and with the low-rank part removed.
        gram: mean of x xᵀ, in the basis of `weight`.
        fmt: target format; its scales are those of `fmt.quantize(weight, clip)`.
        damp: added to the diagonal, as a fraction of its mean.

    Returns a QTensor of `fmt`. Columns of zero diagonal are rounded to nearest.
    """
    base = fmt.quantize(weight, clip)
    n, k = weight.shape
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp_min(1e-30)
    order = diagonal.argsort(descending=True, stable=True)
    h = gram[order][:, order].clone()
    h.diagonal().add_(damp * mean).clamp_min_(1e-6 * mean)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(_cholesky(h, mean)), upper=True)

    width = fmt.block or k
    group = (torch.arange(k, device=weight.device) // width)[order]
    step = fmt.step(base.scales, base.global_scale).expand(n, k // width)[:, group]
    zero = 0.0 if base.zero is None else base.zero.float()[:, group]
    w, codes = weight[:, order].clone(), torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    inverse = torch.where(step > 0, 1 / step, 0.0)
    for start in range(0, k, block):
        stop = min(start + block, k)
        local = w[:, start:stop].T.contiguous()  # (columns, N): each column is contiguous
        errors = torch.empty_like(local)
        triangle = factor[start:stop, start:stop]
        for i in range(stop - start):
            z = zero if isinstance(zero, float) else zero[:, start + i]
            code = fmt.element.encode((local[i] - z) * inverse[:, start + i])
            value = fmt.element.decode(code) * step[:, start + i] + z
            codes[:, start + i] = code
            errors[i] = (local[i] - value) / triangle[i, i]
            if i + 1 < stop - start:
                local[i + 1 :].sub_(torch.outer(triangle[i, i + 1 :], errors[i]))
        w[:, stop:].sub_(errors.T @ factor[start:stop, stop:])
    back = torch.empty_like(order)
    back[order] = torch.arange(k, device=order.device)
    return replace(base, codes=packing.pack(codes[:, back].contiguous(), fmt.bits))


def _cholesky(h: Tensor, mean: Tensor) -> Tensor:
    """Lower Cholesky factor, with just as much more damping as rounding errors in h ask for."""
    extra = 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(h)
        if not int(info):
            return factor
        extra = max(1e-4, extra * 10)
        h = h.clone()
        h.diagonal().add_(extra * mean)
