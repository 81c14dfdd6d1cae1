r"""Pure torch for every op: the meaning, the oracle of the tests, and a backend that runs everywhere.

    y = Q_a(((x + shift) / smooth) H) · W_qᵀ + (x · downᵀ) · upᵀ + bias

`down` sees the raw input, so that a LoRA is more rank and nothing else. H is a block Hadamard transform along K, or absent. Activations
are multiplied by reciprocals (1 / smooth, 1 / scale), as the fused kernels do, so that codes can be compared bit for bit. Everything is
computed in float32 and returned in the dtype of x.
"""

__all__ = ["fake_act", "hadamard_blocks", "linear", "linear_grad", "quantize_act", "transform_act", "weight"]

import math
from functools import lru_cache

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.kernels.registry import Ask, Kernel, Needs, find, register


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    act_scale: Tensor | None,
    weight_format: str,
    act: str,
    n: int,
    hadamard: int,
) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype. See `qgen.kernels.ops.SLOTS` for the tensors."""
    w = weight(codes, scales, global_scale, zero, weight_format)  # (N, Kp)
    xh = transform_act(x, w.shape[1], smooth, shift, hadamard)
    if act:
        xh = fake_act(xh, act, act_scale)
    y = xh @ w.T
    if down is not None:
        y = y + (x.float() @ down.float().T) @ up.float().T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_grad(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    zero: Tensor | None,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    k: int,
    weight_format: str,
    hadamard: int,
    kernel: str,
) -> Tensor:
    """Gradient (…, K) of `linear` with respect to x, straight through the rounding of activations."""
    ask = Ask("linear", dy.device.type, weight_format, n=dy.shape[-1], k=k)
    slots = {
        "codes": codes,
        "scales": scales,
        "global_scale": global_scale,
        "zero": zero,
        "smooth": smooth,
        "down": down,
        "up": up,
    }
    slots = find("linear", kernel).unpack({name: t for name, t in slots.items() if t is not None}, ask)
    w = weight(slots["codes"], slots["scales"], slots.get("global_scale"), slots.get("zero"), weight_format)
    dx = dy.float() @ w
    if hadamard:
        dx = hadamard_blocks(dx, hadamard)
    dx = dx[..., :k]
    if smooth is not None:
        dx = dx / slots["smooth"].float()
    if down is not None:
        dx = dx + (dy.float() @ slots["up"].float()) @ slots["down"].float()
    return dx.to(dy.dtype)


def weight(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, zero: Tensor | None, weight_format: str
) -> Tensor:
    """Dequantized weight (N, Kp) float32 from canonical tensors."""
    return QTensor(codes, scales, global_scale, zero, weight_format).dequantize()


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


register(Kernel("linear", "reference", Needs(), linear, priority=-100))
