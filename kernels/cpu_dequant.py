r"""`cpu_dequant`: every weight format, any activations, on any CPU: values of the weight by table, then one matrix product.

    y = x̂ · Wᵀ + ((x · downᵀ) · upᵀ + bias),    x̂ = Q_a(((x + shift) / smooth) H)

The weight's values live for one call (N · Kp numbers, shared by all layers). The product runs in float32, or in bfloat16 where that is
quicker and close enough (`_product`); then W, x̂ and the low-rank part are each rounded to it once. Activations are quantized to the
reference's codes. Sums over K are the BLAS library's: its order, hence the last bit, may change with the thread count.
"""

__all__ = ["linear", "quantized"]

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from qgen import formats
from qgen.kernels import cpu_codes, reference
from qgen.kernels.registry import Kernel, Needs, register
from qgen.kernels.slots import Slots


def linear(x: Tensor, slots: Slots) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype, from canonical tensors."""
    return multiply(x, quantize(x, slots), slots)


def quantize(x: Tensor, slots: Slots) -> Tensor:
    """x̂ (M, Kp), in float32 or as it came: the half of `linear` that layers with a common input may share."""
    return quantized(x.reshape(-1, x.shape[-1]), slots, slots.codes.shape[-1] * 8 // formats.get(slots.weight).bits)


def multiply(x: Tensor, xh: Tensor, slots: Slots) -> Tensor:
    """The other half: y of x and its x̂."""
    rows = x.reshape(-1, x.shape[-1])
    dtype = _product(rows, slots.weight)
    w = cpu_codes.weight(slots.codes, slots.scales, slots.global_scale, slots.zero, slots.weight, dtype)
    bias = None if slots.bias is None else slots.bias.to(dtype)
    if slots.down is None:
        y = matmul(xh.to(dtype), w, bias)
    else:
        y = matmul(matmul(rows.to(dtype), slots.down.to(dtype)), slots.up.to(dtype), bias)
        y = y.addmm_(xh.to(dtype), w.T)
    return y.to(x.dtype).reshape(*x.shape[:-1], slots.n)


def quantized(rows: Tensor, slots: Slots, kp: int) -> Tensor:
    """x̂ (M, Kp) of rows (M, K): transformed and through the activations' format; the rows themselves if nothing is asked."""
    plain = slots.smooth is None and slots.shift is None and not slots.hadamard
    if plain and not slots.act and kp == rows.shape[1]:
        return rows
    xh = reference.transform_act(rows, kp, slots.smooth, slots.shift, slots.hadamard)
    return cpu_codes.fake_act(xh, slots.act, slots.act_scale) if slots.act else xh


def _product(rows: Tensor, weight_format: str) -> torch.dtype:
    """The dtype of the product: bfloat16 if x is, the processor has instructions for it, there are rows enough to pay, and scales change
    along K. One scale per row leaves sixteen values whose rounding errors repeat along K and add up: 1.1e-2 relative RMS with uint4_row.
    """
    block = formats.get(weight_format).block or rows.shape[1]
    quick = rows.dtype == torch.bfloat16 and cpu_codes.fast_bf16() and len(rows) >= 32
    return torch.bfloat16 if quick and block <= 128 else torch.float32


_needs = Needs(devices=("cpu",))
register(Kernel("linear", "cpu_dequant", _needs, linear, 10, quantize=quantize, multiply=multiply))
