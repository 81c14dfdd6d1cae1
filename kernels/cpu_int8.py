r"""`cpu_int8`: W4A8 and W8A8 in plain torch, through its int8 matrix product.

    y = (q_x · q_wᵀ) · step_x · step_w + ((x · downᵀ) · upᵀ + bias),    q_w = code · subscale, an int8

4-bit codes become int8 by one gather and one in-place product with the integer subscales; the int8 weight lives for one call. The sums are
exact integers and do not depend on the number of threads; only the low-rank part is rounded to bfloat16 once more when x is bfloat16.
"""

__all__ = ["int8_weight", "quantize"]

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from qgen import formats
from qgen.formats.integer import INT4
from qgen.kernels import cpu_codes, reference
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots


@dataclass(frozen=True)
class Int8Needs(Needs):
    """Needs that end with a processor whose int8 products do not saturate."""

    def refusals(self, ask: Ask) -> list[str]:
        why = super().refusals(ask)
        if not why and not cpu_codes.has_int8():
            why.append("needs a processor with avx512_vnni, avx_vnni or amx_int8")
        return why


def linear(x: Tensor, slots: Slots) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype, from canonical tensors."""
    return _multiply(x, _quantize(x, slots), slots)


def _quantize(x: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    kp = slots.codes.shape[-1] * 8 // formats.get(slots.weight).bits
    xh = reference.transform_act(x.reshape(-1, x.shape[-1]), kp, slots.smooth, slots.shift, slots.hadamard)
    return quantize(xh, slots.act_scale)


def _multiply(x: Tensor, made: tuple[Tensor, Tensor], slots: Slots) -> Tensor:
    rows, (q, step_x) = x.reshape(-1, x.shape[-1]), made
    w, bias = int8_weight(slots.codes, slots.scales, slots.weight), slots.bias
    step_w = (slots.scales if slots.global_scale is None else slots.global_scale).float().T  # (1, N)
    y = torch._int_mm(q, w.T).float().mul_(step_x).mul_(step_w)
    if slots.down is not None:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and cpu_codes.fast_bf16() else torch.float32
        h = matmul(rows.to(dtype), slots.down.to(dtype))
        y += matmul(h, slots.up.to(dtype), None if bias is None else bias.to(dtype))
    elif bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], slots.n)


def int8_weight(codes: Tensor, scales: Tensor, weight_format: str) -> Tensor:
    """(N, Kp) int8: code · subscale, or the int8 codes themselves."""
    fmt = formats.get(weight_format)
    if fmt.bits == 8:
        return codes.view(torch.int8)
    return fmt.blocks(cpu_codes.decode(codes, INT4, torch.int8)).mul_(scales.view(torch.int8)[..., None]).flatten(-2)


def quantize(x: Tensor, act_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M, Kp) int8 and steps (M, 1) float32 of x (M, Kp) float32: `reference.quantize_act` with int8_row, bit for bit."""
    fmt = formats.get("int8_row")
    if act_scale is None:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)  # one pass, no |x| in memory; NaN spreads as in amax
        step = fmt.store(torch.maximum(high, -low) / fmt.element.max)
    else:
        step = act_scale.float().expand(x.shape[0], 1)
    q = x * torch.where(step > 0, 1.0 / step, 0.0)
    return q.nan_to_num_(nan=fmt.element.max).round_().clamp_(fmt.element.min, fmt.element.max).to(torch.int8), step


_needs = Int8Needs(
    devices=("cpu",), weights=("int4_s8_g32", "int4_s8_g64", "int4_s8_g128", "int8_row"), acts=("int8_row",)
)
register(Kernel("linear", "cpu_int8", _needs, linear, 20, quantize=_quantize, multiply=_multiply))
