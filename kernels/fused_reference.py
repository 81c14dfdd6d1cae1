"""Pure torch for the fused ops: their meaning, the oracle of their tests, and what serves them where no kernel does.

Each step is computed in float32 and rounded where the unfused modules would store it; only an activation behind a layer
reads the float32 sum, as fused kernels do.
"""

__all__ = ["activate", "apply_heads", "fused_linear", "mlp", "produce"]

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen.kernels import reference
from qgen.kernels.fusion import GATED, Heads, Producer
from qgen.kernels.registry import Kernel, Needs, register
from qgen.kernels.slots import Slots


def fused_linear(x: Tensor, slots: Slots, producer: Producer, activation: str, heads: Heads | None) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype; see `fusion`."""
    y = activate(reference.product(produce(x, producer), slots), activation)
    return (y if heads is None else apply_heads(y, heads)).to(x.dtype)


def mlp(x: Tensor, first: Slots, second: Slots, producer: Producer, activation: str) -> Tensor:
    """x (…, K) through two layers to (…, N2). activation: one of ACTIVATIONS, or "silu_mul": first gives [gate | value]."""
    if activation == GATED:
        gate, value = reference.linear(produce(x, producer), first).chunk(2, -1)
        middle = (F.silu(gate.float()) * value.float()).to(x.dtype)
    else:
        middle = fused_linear(x, first, producer, activation, None)
    return reference.linear(middle, second)


def produce(x: Tensor, producer: Producer) -> Tensor:
    """The producer's output for x (…, K), in x's dtype."""
    t, kind = x.float(), producer.kind
    if kind in ("layernorm", "rmsnorm"):
        if kind == "layernorm":
            t = t - t.mean(-1, keepdim=True)
        t = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + producer.eps)
        t = t if producer.gamma is None else t * producer.gamma.float()
        t = t if producer.beta is None else t + producer.beta.float()
        t = t if producer.scale is None else t * (1 + _per_row(producer.scale, t))
        t = t if producer.shift is None else t + _per_row(producer.shift, t)
    elif kind == "silu_mul":
        t = F.silu(t) * producer.gate.float().reshape(t.shape)
    else:
        t = activate(t, kind)
    return t.to(x.dtype)


def _per_row(modulation: Tensor, t: Tensor) -> Tensor:
    """(B, K) to the shape of t (…, K): image b's row for its share of the rows."""
    rows = t.shape[:-1].numel()
    return modulation.float().repeat_interleave(max(rows // modulation.shape[0], 1), 0)[:rows].reshape(t.shape)


def activate(t: Tensor, activation: str) -> Tensor:
    """none, gelu_tanh or silu of a float32 tensor."""
    if activation == "gelu_tanh":
        return F.gelu(t, approximate="tanh")
    return F.silu(t) if activation == "silu" else t


def apply_heads(y: Tensor, heads: Heads) -> Tensor:
    """RMSNorm and rotation of the leading columns of y (…, N) float32."""
    t = y[..., : heads.columns].unflatten(-1, (-1, heads.dim))  # (…, H, D)
    if heads.gamma is not None:
        t = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + heads.eps)
        t = t * heads.gamma.float().view(-1, heads.dim)
    if heads.cos is not None:
        at = torch.arange(y.shape[:-1].numel(), device=y.device) % heads.cos.shape[0]
        shape = (*y.shape[:-1], 1, heads.dim // 2)
        cos, sin = heads.cos.float()[at].view(shape), heads.sin.float()[at].view(shape)
        a, b = t.chunk(2, -1) if heads.halves else (t[..., 0::2], t[..., 1::2])
        turned = (a * cos - b * sin, a * sin + b * cos)
        t = torch.cat(turned, -1) if heads.halves else torch.stack(turned, -1).flatten(-2)
    return torch.cat([t.flatten(-2), y[..., heads.columns :]], -1)


register(Kernel("fused_linear", "reference", Needs(), fused_linear, priority=-100))
register(Kernel("mlp", "reference", Needs(), mlp, priority=-100))
