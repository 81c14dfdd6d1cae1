r"""Fake quantization that can be trained: the forward pass rounds exactly as the packed layer, the backward pass does not see it.

    ŵ = s · clamp(round((w − z) / s)) + z        ∂ŵ/∂w = 1 inside the range, 0 outside
                                                 ∂ŵ/∂s = code − (w − z) / s inside, code outside

The second line is the gradient of learned step sizes. It needs no formula of its own: rounding is replaced by the identity in one place,
and what is around it is ordinary arithmetic.
Bengio et al., 2013, https://arxiv.org/abs/1308.3432 · LSQ, Esser et al., 2020, https://arxiv.org/abs/1902.08153
"""

__all__ = ["activations", "anchor", "through", "weights"]

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import NumberFormat, QTensor
from qgen.kernels import reference


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exact: Tensor, soft: Tensor) -> Tensor:
        return exact.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def through(exact: Tensor, soft: Tensor) -> Tensor:
    """`exact`, bit for bit, with the gradient of `soft`; both of one shape and dtype."""
    return _Through.apply(exact.detach(), soft)


def weights(fmt: NumberFormat, w: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """w (N, Kp) float32 rounded on the grid of a `plain` format, (N, Kp) float32; scales and global_scale may ask for gradients."""
    step = fmt.step(scales, global_scale)[..., None]
    blocks = fmt.blocks(w)
    offset = 0.0 if zero is None else zero.float()[..., None]
    units = ((blocks - offset) / torch.where(step > 0, step, 1.0)).clamp(fmt.element.min, fmt.element.max)
    with torch.no_grad():
        code = fmt.element.round(fmt.normalize(w, scales, global_scale, zero))
    q = through(fmt.blocks(code), torch.where(step > 0, units, 0.0))
    return (q * step + offset).flatten(-2)


def activations(x: Tensor, act: str, act_scale: Tensor | None = None) -> Tensor:
    """`reference.fake_act(x, act, act_scale)` of x (…, Kp) float32, with a gradient.

    Scales that are measured at run time always cover x: the gradient is the identity. With static ones (Kp / block,), which may ask for
    gradients themselves, it is that of learned steps; formats with zero points pass it to x alone.
    """
    if act_scale is None:
        return through(reference.fake_act(x.detach(), act), x)
    fmt = formats.get(act)
    if fmt.zero_point:
        return through(reference.fake_act(x.detach(), act, act_scale.detach()), x)
    step = act_scale.float().clamp_min(1e-12)[..., None]
    units = (fmt.blocks(x) / step).clamp(fmt.element.min, fmt.element.max)
    with torch.no_grad():
        code = fmt.element.round(fmt.normalize(x, act_scale.expand(fmt.blocks(x).shape[:-1]), None, None, True))
    return (through(fmt.blocks(code), units) * act_scale.float()[..., None]).flatten(-2)


def anchor(q: QTensor, wanted: Tensor | None, margin: float = 0.02) -> Tensor:
    """A float weight (N, Kp) that rounds to the codes of q and is, inside each code's cell, as close as can be to `wanted` (N, Kp).

    So training starts from exactly the packed layer, whoever chose its codes, and a weight that was near the border of its cell is still
    near it. Cells of the first and last code end at these codes. `wanted` None: the middle of each cell. margin: kept free at the borders,
    as a share of the gap between two values.
    """
    fmt = formats.get(q.format)
    code = fmt.element.decode(fmt.unpack(q.codes))  # (N, Kp)
    units = code
    if wanted is not None:
        values = torch.tensor(sorted({v + 0.0 for v in fmt.element.values if v == v}), device=code.device)
        at = torch.searchsorted(values, code.contiguous())
        low = values[(at - 1).clamp_min(0)]
        high = values[(at + 1).clamp_max(len(values) - 1)]
        reach = 0.5 - margin
        units = fmt.normalize(wanted, q.scales, q.global_scale, q.zero)
        units = units.maximum(code - reach * (code - low)).minimum(code + reach * (high - code))
    return fmt.scaled(units, q.scales, q.global_scale, q.zero)
