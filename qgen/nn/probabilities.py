r"""Attention probabilities in few bits: what softmax gives follows a power law, and a start token may take most of it.

    uniform:    p ≈ s q / (2^b − 1)
    log2:       p ≈ s 2^(−q)            logsqrt2:  p ≈ s 2^(−q/2)         (`qgen.formats.log2`; the last code is an exact zero)
    regions:    one bit says whether p is above a split 2^−i; each region has 2^(b−1) equal steps

s is the largest probability, one number for all of a call (`scope="call"`) or one per query. With `apart` > 0 the first keys of
cross-attention, the start token of a text encoder, stay as they are and s is the largest of the *others*, found at run time: it differs
from prompt to prompt, and next to a start token near 1 a common range would round the whole text to zero.

No kernel computes with such codes: P is rounded here in plain torch and multiplied in floats, which tells what a kernel would be worth.
DGQ, Ryu et al., 2025, https://arxiv.org/abs/2501.04304 · log-√2: RepQ-ViT, Li et al., 2022, https://arxiv.org/abs/2212.08254 · two regions:
TQ-DiT, 2025, https://arxiv.org/abs/2502.04056
"""

__all__ = ["ProbabilitySpec", "attention", "rounded", "simulated"]

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qgen import formats
from qgen.errors import unknown

KINDS = ("uniform", "log2", "logsqrt2", "regions")


@dataclass(frozen=True)
class ProbabilitySpec:
    """kind: see above. bits: 3, 4, 5 or 8 for logarithms, 2 to 8 for the others. apart: leading keys of cross-attention (Lq != Lk) that
    stay in floats. scope: "call" or "query", what shares s. ValueError for anything else."""

    kind: str = "log2"
    bits: int = 4
    apart: int = 0
    scope: str = "call"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("code of probabilities", str(self.kind), KINDS))
        most = (3, 4, 5, 8) if self.kind.startswith("log") else range(2, 9)
        if self.bits not in most:
            raise ValueError(f"{self.kind} has {', '.join(map(str, most))} bits, found {self.bits}")
        if self.apart < 0 or self.scope not in ("call", "query"):
            raise ValueError(
                f'apart is a number of keys and scope "call" or "query", found {self.apart}, {self.scope!r}'
            )


def rounded(p: Tensor, spec: ProbabilitySpec, top: Tensor | None = None) -> Tensor:
    """Probabilities p (…, Lq, Lk) float32 there and back; none is apart here. top: s, else the largest of p in the spec's scope."""
    if top is None:
        top = p.amax(-1, keepdim=True) if spec.scope == "query" else p.amax()
    unit = torch.where(top > 0, p / top, 0.0).clamp(0, 1)
    if spec.kind == "uniform":
        steps = (1 << spec.bits) - 1
        return (unit * steps).round() / steps * top
    if spec.kind == "regions":
        return _regions(unit, spec.bits) * top
    return formats.get(f"{spec.kind}_{spec.bits}_row").element.round(unit) * top


def _regions(unit: Tensor, bits: int) -> Tensor:
    """Two ranges of equal steps, [0, split] and [split, 1], at the split of least squared error."""
    steps = (1 << (bits - 1)) - 1
    best, least = unit, math.inf
    for i in range(1, 9):
        split = 2.0**-i
        low = (unit / split * steps).round() * (split / steps)
        high = split + ((unit - split) / (1 - split) * steps).round() * ((1 - split) / steps)
        made = torch.where(unit > split, high, low)
        if (lost := float((made - unit).square().sum())) < least:
            best, least = made, lost
    return best


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    spec: ProbabilitySpec,
) -> Tensor:
    """torch's attention with P rounded: q (…, H, Lq, D), k (…, Hkv, Lk, D), v (…, Hkv, Lk, Dv) to (…, H, Lq, Dv) in v's dtype."""
    if dropout_p:
        raise ValueError("probabilities are rounded for inference; found dropout in attention: call model.eval()")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    lq, lk = query.shape[-2], key.shape[-2]
    logits = query.float() @ key.float().transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        logits = logits.masked_fill(torch.ones(lq, lk, dtype=torch.bool, device=logits.device).triu(1), -math.inf)
    if attn_mask is not None:
        logits = (
            logits.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else logits + attn_mask.float()
        )
    p = logits.softmax(-1).nan_to_num(0.0)  # rows that see no key
    apart = spec.apart if lq != lk else 0
    p = torch.cat([p[..., :apart], rounded(p[..., apart:], spec)], -1)
    return (p @ value.float()).to(value.dtype)


class _Simulate(TorchFunctionMode):
    def __init__(self, spec: ProbabilitySpec):
        super().__init__()
        self.spec = spec

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return attention(*args, **(kwargs or {}), spec=self.spec)
        return func(*args, **(kwargs or {}))


@contextmanager
def simulated(kind: str = "log2", bits: int = 4, apart: int = 0, scope: str = "call") -> Iterator[None]:
    """`with simulated("log2", 4, apart=1): pipe(...)`: every call of torch's attention in this thread rounds its probabilities."""
    with _Simulate(ProbabilitySpec(kind, bits, apart, scope)):
        yield
