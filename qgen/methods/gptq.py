r"""GPTQ: rounds columns one by one, pushing each column's error into those still unrounded.

Minimizes tr(E H Eᵀ), E = W − Q, H = mean of x̂ x̂ᵀ over calibration rows in the basis of the target, with the noise of quantized
activations added to its diagonal. With H = L Lᵀ it is Σ_k L_kk² ‖E_k + Σ_{j>k} E_j L_jk / L_kk‖²: taken from the last column to the first,
each is rounded with what the later ones lost added to it. These are GPTQ's codes without the inverse of H (Chee et al., 2023).
Few prompts make H overfit: dampings (a multiple of the mean diagonal, added to it) are tried in ascending order, and the one with the
smallest error on held-out rows is kept. Columns are taken by descending diagonal; scales are fixed before the first one. Tried and
dropped: aiming at W G H⁻¹, the weight that serves *rounded* inputs best, lowers the error of single layers by 0.5 dB and costs 0.4 dB of
PSNR at the pictures, since what it shrinks away is the same at every step and adds up.
Frantar et al., 2022, https://arxiv.org/abs/2210.17323 · LDLQ, https://arxiv.org/abs/2307.13304
"""

__all__ = ["GPTQ", "Factor", "factor", "factorize", "gptq", "hessian", "round_with"]

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen import formats
from qgen.errors import BadData
from qgen.formats import Element, NumberFormat, QTensor, packing
from qgen.formats.integer import Integer
from qgen.kernels import cpu_columns
from qgen.kernels.reference import hadamard_blocks
from qgen.methods.base import Judge, Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("gptq")
@dataclass(frozen=True)
class GPTQ:
    """Lowers the output error on fitted rows; kept only where it lowers the error on held-out rows.

    damps: candidates, as fractions of the mean diagonal of H; a larger one is tried only while the held-out error exceeds the fitted one by
    more than `gap` and falls. outputs: of a layer with twice as many or more, a part is rounded to judge
    them. block: columns per lazy update.
    """

    name: ClassVar[str] = "gptq"
    optional: ClassVar[bool] = True
    damps: tuple[float, ...] = (0.02, 0.1, 0.5)
    gap: float = 0.05
    outputs: int = 256
    block: int = 128

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        target, fmt = draft.target(), formats.get(draft.spec.weight)
        if not fmt.plain:
            return draft
        damp, damped = self._choose(draft, target, fmt, stats)
        code = round_with(target, damped, fmt, draft.clip, self.block)
        return replace(draft, qweight=code).noted(damp=damp)

    def _choose(self, draft: Draft, target: Tensor, fmt: NumberFormat, stats: Stats) -> tuple[float, "Factor"]:
        """The damping with the smallest error on held-out rows, judged by every so many of the outputs of a large layer."""
        damps = sorted(self.damps)
        if len(damps) == 1:
            return damps[0], factor(draft, stats, damps[0])
        some = slice(None, None, max(1, len(target) // self.outputs))
        part = _outputs(draft, some)
        judges = [Judge(rows[:512]) for rows in (stats.judge.rows, stats.fit)]
        best, least, kept = damps[0], math.inf, (None, None)
        for damp in damps:
            code = round_with(target[some], factor(draft, stats, damp), fmt, part.clip, self.block)
            held, fitted = (judge.error(replace(part, qweight=code)) for judge in judges)
            if kept[1] is not None and not held < least:
                break
            best, least, kept = damp, held, stats.cache["factor"]
            if held < (1 + self.gap) * fitted:
                break
        stats.cache["factor"] = kept  # whoever refits the branch asks for it again
        return best, kept[1]


def _outputs(draft: Draft, some: slice) -> Draft:
    """The draft of some of its outputs alone."""
    up = None if draft.up is None else draft.up[some]
    clip = draft.clip[some] if isinstance(draft.clip, Tensor) else draft.clip
    return replace(draft, weight=draft.weight[some], up=up, clip=clip, bias=None, bias_fix=None, qweight=None)


@dataclass(frozen=True)
class Factor:
    """H damped, as what column-wise rounding uses: `order` of the columns, from the last to be rounded to the first, H = L Lᵀ in it."""

    order: Tensor
    lower: Tensor


def factor(draft: Draft, stats: Stats, damp: float) -> Factor:
    """The factor of the draft's H at one damping: K³ / 3 operations. The last one asked for is kept."""
    key = (draft.smooth, draft.shift, draft.hadamard, damp)
    cached = stats.cache.get("factor")
    if cached is None or not _same(cached[0], key):
        stats.cache["factor"] = cached = (key, factorize(hessian(draft, stats), damp))
    return cached[1]


def _same(a: tuple, b: tuple) -> bool:
    return all(x is y or (not isinstance(x, Tensor) and x == y) for x, y in zip(a, b, strict=True))


def hessian(draft: Draft, stats: Stats) -> Tensor:
    """H (Kp, Kp) float32 in the basis of the draft's target, activation rounding noise included. The last one asked for is kept."""
    key = (draft.smooth, draft.shift, draft.hadamard, draft.act)
    cached = stats.cache.get("hessian")
    if cached is None or not _same(cached[0], key):
        stats.cache["hessian"] = cached = (key, _hessian(draft, stats))
    return cached[1]


def _hessian(draft: Draft, stats: Stats) -> Tensor:
    smooth = draft.smooth
    h = stats.gram.clone() if smooth is None else (stats.gram / smooth).div_(smooth[:, None])
    if draft.k_padded > h.shape[0]:
        extra = draft.k_padded - h.shape[0]
        h = torch.nn.functional.pad(h, (0, extra, 0, extra))
    if draft.hadamard:
        h = hadamard_blocks(hadamard_blocks(h, draft.hadamard).T, draft.hadamard).T.contiguous()
    if draft.act and stats.fit is not None:
        h.diagonal().add_(noise(draft, stats))
    return h


def noise(draft: Draft, stats: Stats) -> Tensor:
    """(Kp,) mean square of what rounding the activations adds to each column of the inputs."""
    rows = stats.fit[:1024]
    return (draft.inputs(rows) - draft.inputs(rows, quantized=False)).square().mean(0)


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
    return round_with(weight, factorize(gram, damp), fmt, clip, block)


def factorize(gram: Tensor, damp: float) -> Factor:
    """Columns by ascending diagonal, since rounding starts at the last one."""
    order = gram.diagonal().argsort(stable=True)
    return Factor(order, cholesky(lambda: _permuted(gram, order), damp))


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    """gram[order][:, order], some rows at a time: a second copy of a wide layer's matrix is a tenth of a gigabyte."""
    made = torch.empty_like(gram)
    for to, rows in zip(made.split(512), order.split(512), strict=True):
        torch.index_select(gram[rows], 1, order, out=to)
    return made


def round_with(weight: Tensor, factor: Factor, fmt: NumberFormat, clip: Tensor | float, block: int) -> QTensor:
    """The rounding itself, on transposed weights: a column of W is a row in memory."""
    base = fmt.quantize(weight, clip)
    n, k = weight.shape
    order, lower = factor.order, factor.lower
    width = fmt.block or k
    group = (torch.arange(k, device=weight.device) // width)[order]
    step = fmt.step(base.scales, base.global_scale).expand(n, k // width).T.contiguous()[group]  # (K, N)
    lost = weight.T[order]  # (K, N): W, and row by row, once it is rounded, E
    if base.zero is not None:
        nothing = fmt.scaled(torch.zeros_like(weight), base.scales, base.global_scale, base.zero)
        lost -= nothing[:, ::width].T[group]  # what the element's zero stands for
    values = torch.empty_like(lost)  # on the grid, in units of a step
    diagonal = lower.diagonal()
    for stop in range(k, 0, -block):
        start = max(0, stop - block)
        feed = lower[start:, start:stop] / diagonal[start:stop]
        back = torch.addmm(lost[start:stop], feed[stop - start :].T, lost[stop:])  # with what later columns lost added
        mine = slice(start, stop)
        _round_rows(back, lost[mine], values[mine], step[mine], feed[: stop - start].tril(-1), fmt.element)
    del lost, step, back  # each is as large as the layer in float32
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(k, device=order.device)
    parts = [
        packing.pack(fmt.element.encode(part[inverse].T.contiguous()), fmt.bits) for part in values.split(512, dim=1)
    ]
    return replace(base, codes=torch.cat(parts))


def _round_rows(back: Tensor, lost: Tensor, values: Tensor, step: Tensor, feed: Tensor, element: Element) -> None:
    """Rounds rows (columns of W), the last one first, into `values`, and leaves in `lost` what each of them lost."""
    kind = "integer" if isinstance(element, Integer) else element.name
    if back.device.type == "cpu" and kind in ("integer", "e2m1") and not cpu_columns.lacking():
        return cpu_columns.round_columns(back, lost, values, step, feed, kind, element.min, element.max)
    units = torch.where(step > 0, 1 / step, 0.0)
    for high in range(len(lost), 0, -_INNER):
        low = max(0, high - _INNER)
        rows = [t[low:high].unbind(0) for t in (back, lost, values, step, units)]
        for i in range(high - low - 1, -1, -1):
            b, e, v, s, u = (r[i] for r in rows)
            torch.mul(b, u, out=v)
            v.copy_(element.round(v))
            e.addcmul_(v, s, value=-1)
            if i:
                back[low : low + i].addr_(feed[low + i, low : low + i], e)
        if low:
            back[:low].addmm_(feed[low:high, :low].T, lost[low:high])


_INNER = 16  # columns whose feedback is added one by one; beyond them it goes through matrix products


def cholesky(make: Callable[[], Tensor], damp: float) -> Tensor:
    """Lower Cholesky factor of what `make` returns (a second moment, (K, K), contiguous; used up, and made again for another try), with
    `damp` times its mean diagonal added, and just as much more as rounding errors ask for."""
    while True:
        h = make()
        h.diagonal().add_(damp * h.diagonal().mean().clamp_min(1e-30))
        info = torch.empty((), dtype=torch.int32, device=h.device)
        # In place: LAPACK's upper factor of the transpose is, row by row, the lower one of a symmetric matrix.
        torch.linalg.cholesky_ex(h.mT, upper=True, out=(h.mT, info))
        if not int(info):
            return h
        if damp > 1e3:  # nothing finite resists that much
            raise BadData(
                "the second moment of a layer's input holds NaN or infinity: its activations overflow float32 when squared"
            )
        damp = max(1e-4, damp * 10)
