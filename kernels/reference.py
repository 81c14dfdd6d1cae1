r"""Pure torch for every op: the meaning, the oracle of the tests, and a backend that runs everywhere.

    y = Q_a(((x + shift) / smooth) H) · W_qᵀ + (x · downᵀ) · upᵀ + bias

`down` sees the raw input, so that a LoRA is more rank and nothing else. H is a block Hadamard transform along K, or absent. Activations
are multiplied by reciprocals (1 / smooth, 1 / scale), as the fused kernels do, so that codes can be compared bit for bit. Everything is
computed in float32 and returned in the dtype of x.
"""

__all__ = [
    "fake_act",
    "float_weight",
    "hadamard_blocks",
    "linear",
    "linear_grad",
    "multiplied",
    "product",
    "quantize_act",
    "quantized",
    "transform_act",
    "weight",
]

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.kernels.registry import Ask, Kernel, Needs, find, register
from qgen.kernels.slots import SLOTS, Slots


def linear(x: Tensor, slots: Slots) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype. See `qgen.kernels.slots` for the tensors."""
    return product(x, slots).to(x.dtype)


def product(x: Tensor, slots: Slots) -> Tensor:
    """`linear` before it is rounded: (…, N) float32."""
    return multiplied(x, quantized(x, slots), slots)


def quantized(x: Tensor, slots: Slots) -> Tensor:
    """x̂ (…, Kp) float32 of x (…, K): what the quantized weight is multiplied with."""
    kp = slots.codes.shape[-1] * 8 // formats.get(slots.weight).bits
    xh = transform_act(x, kp, slots.smooth, slots.shift, slots.hadamard)
    return fake_act(xh, slots.act, slots.act_scale) if slots.act else xh


def multiplied(x: Tensor, xh: Tensor, slots: Slots) -> Tensor:
    """The rest of `product`: (…, N) float32 of the raw input and of what `quantized` made of it."""
    w = weight(slots.codes, slots.scales, slots.global_scale, slots.zero, slots.weight)  # (N, Kp)
    y = xh @ w.T
    if slots.down is not None:
        y = y + (x.float() @ slots.down.float().T) @ slots.up.float().T
    return y if slots.bias is None else y + slots.bias.float()


def linear_grad(dy: Tensor, slots: Slots, k: int, kernel: str) -> Tensor:
    """Gradient (…, K) of `linear` with respect to x, straight through the rounding of activations.

    slots: as `kernel` lays them out; only what the derivative of a linear map needs is read.
    """
    ask = Ask("linear", dy.device.type, slots.weight, n=dy.shape[-1], k=k)
    tensors = {name: t for name in SLOTS[:7] if (t := getattr(slots, name)) is not None}
    slots = Slots.of(find("linear", kernel).unpack(tensors, ask), slots.weight, "", slots.n, slots.hadamard)
    dx = dy.float() @ weight(slots.codes, slots.scales, slots.global_scale, slots.zero, slots.weight)
    if slots.hadamard:
        dx = hadamard_blocks(dx, slots.hadamard)
    dx = dx[..., :k]
    if slots.smooth is not None:
        dx = dx / slots.smooth.float()
    if slots.down is not None:
        dx = dx + (dy.float() @ slots.up.float()) @ slots.down.float()
    return dx.to(dy.dtype)


def weight(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, weight_format: str
) -> Tensor:
    """Dequantized weight (N, Kp) float32 from canonical tensors."""
    return QTensor(codes, scales, global_scale, zero, weight_format).dequantize()


def float_weight(slots: Mapping[str, Tensor], weight_format: str, hadamard: int, k: int) -> Tensor:
    """The weight (N, K) float32 that canonical slots stand for: residual · Hᵀ / smooth + up · down."""
    w = weight(slots["codes"], slots["scales"], slots.get("global_scale"), slots.get("zero"), weight_format)
    w = (hadamard_blocks(w, hadamard) if hadamard else w)[:, :k]
    if "smooth" in slots:
        w = w / slots["smooth"].float()
    if "down" in slots:
        w = w + slots["up"].float() @ slots["down"].float()
    return w


def transform_act(x: Tensor, kp: int, smooth: Tensor | None, shift: Tensor | None, hadamard: int) -> Tensor:
    """((x + shift) · (1 / smooth)) H, padded with zeros from K to `kp` columns, float32."""
    xh = x.float()
    if shift is not None:
        xh = xh + shift.float()
    if smooth is not None:
        xh = xh * (1.0 / smooth.float())
    if kp > xh.shape[-1]:
        xh = torch.nn.functional.pad(xh, (0, kp - xh.shape[-1]))
    return hadamard_blocks(xh, hadamard) if hadamard else xh


def quantize_act(x: Tensor, act: str, act_scale: Tensor | None = None) -> QTensor:
    """Activations x (…, Kp) float32 to a QTensor of the format `act`; scales per token and block unless given."""
    fmt = formats.get(act)
    like = None
    if act_scale is not None:
        groups = fmt.blocks(x).shape[:-1]
        like = QTensor(
            x,
            act_scale.float().expand(groups),
            None,
            torch.zeros(groups, device=x.device) if fmt.zero_point else None,
            act,
        )
    return fmt.quantize(x, like=like, reciprocal=True)


def fake_act(x: Tensor, act: str, act_scale: Tensor | None = None) -> Tensor:
    """`quantize_act(x).dequantize()`, (…, Kp) float32."""
    if act_scale is None:
        return formats.get(act).fake(x, reciprocal=True)
    return quantize_act(x, act, act_scale).dequantize()


def hadamard_blocks(x: Tensor, size: int) -> Tensor:
    """Multiplies each block of `size` columns of x (…, K) by the symmetric, orthonormal Sylvester-Hadamard matrix of that size."""
    if size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"a block Hadamard needs a power of two that divides K, found {size} for K={x.shape[-1]}")
    return (x.unflatten(-1, (-1, size)) @ _hadamard(size, x.dtype, x.device)).flatten(-2)


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / math.sqrt(size)).to(device=device, dtype=dtype)


def _multiply(x: Tensor, xh: Tensor, slots: Slots) -> Tensor:
    return multiplied(x, xh, slots).to(x.dtype)


register(Kernel("linear", "reference", Needs(), linear, priority=-100, quantize=quantized, multiply=_multiply))
