r"""What comes right before a quantized linear layer, computed while its output is being quantized: norms and
activations.

    layernorm   ((x − mean) / σ · γ + β) · (1 + scale_b) + shift_b          b = row // rows per image (adaLN)
    rmsnorm     (x / rms · γ) · (1 + scale_b) + shift_b
    gelu_tanh   ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))
    silu        x · sigmoid(x)
    silu_mul    silu(x) · gate

Everything is computed in float32 and rounded once to the dtype of x, which is what the unfused module would have
stored. The fused form saves a write and a read of the (M, K) activations.
"""

__all__ = ["KINDS", "Producer", "aot_cases", "gelu_tanh", "produce", "row_statistics", "silu"]

import triton
import triton.language as tl

from qgen.kernels.aot_case import AotCase
from qgen.kernels.fusion import KINDS, Producer


@triton.jit
def silu(x):
    """x · sigmoid(x), float32."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """The tanh form of GELU, float32; tanh by one exponential, exact at both ends."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x - x / (1.0 + tl.exp(2.0 * u))


@triton.jit
def row_statistics(x, stride, rows, keep_rows, K, eps, KIND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and 1 / σ of rows (BM,), float32; the mean of an RMSNorm is 0. Two passes: no cancellation."""
    mean = tl.zeros((BM,), dtype=tl.float32)
    if KIND == "layernorm":
        total = tl.zeros((BM,), dtype=tl.float32)
        for k0 in range(0, K, BK):
            cols = k0 + tl.arange(0, BK)
            keep = keep_rows[:, None] & (cols < K)[None, :]
            total += tl.sum(tl.load(x + rows[:, None] * stride + cols[None, :], mask=keep, other=0.0).to(tl.float32), 1)
        mean = total / K
    squares = tl.zeros((BM,), dtype=tl.float32)
    for k0 in range(0, K, BK):
        cols = k0 + tl.arange(0, BK)
        keep = keep_rows[:, None] & (cols < K)[None, :]
        t = tl.load(x + rows[:, None] * stride + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        t = tl.where(keep, t - mean[:, None], 0.0)
        squares += tl.sum(t * t, 1)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def produce(
    tile, rows, cols, keep, mean, rstd, gamma, beta, scale, shift, rows_per_image, gate, gate_stride, K, KIND:
    tl.constexpr
):  # fmt: skip
    """The producer's output for a tile (BM, BK) of x, in x's dtype; zero where `keep` is not."""
    dtype: tl.constexpr = tile.dtype
    t = tile.to(tl.float32)
    inside = cols < K
    if KIND == "layernorm" or KIND == "rmsnorm":
        t = (t - mean[:, None]) * rstd[:, None]
        if gamma is not None:
            t = t * tl.load(gamma + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        if beta is not None:
            t = t + tl.load(beta + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
        where = (rows // rows_per_image)[:, None] * K + cols[None, :]
        if scale is not None:
            t = t * (1.0 + tl.load(scale + where, mask=keep, other=0.0).to(tl.float32))
        if shift is not None:
            t = t + tl.load(shift + where, mask=keep, other=0.0).to(tl.float32)
    elif KIND == "gelu_tanh":
        t = gelu_tanh(t)
    elif KIND == "silu":
        t = silu(t)
    elif KIND == "silu_mul":
        t = silu(t) * tl.load(gate + rows[:, None] * gate_stride + cols[None, :], mask=keep, other=0.0).to(tl.float32)
    return tl.where(keep, t, 0.0).to(dtype)


def aot_cases() -> list[AotCase]:
    """None of its own: producers are compiled inside the activation kernels."""
    return []
