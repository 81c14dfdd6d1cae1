r"""Two layers that lie side by side along K become one: the last layer of a Flux single block, attention's half and the MLP's.

    y = Q₁(x₁) W₁ᵀ + (x₁ D₁) U₁ᵀ + b₁ + Q₂(x₂) W₂ᵀ + (x₂ D₂) U₂ᵀ + b₂,        x = [x₁, x₂]

Codes, scales, smoothing and U go side by side, D becomes block-diagonal, biases add: 4-bit weights bit for bit. What one layer cannot do is
round its halves in two ways, INT4's signed and its unsigned one, or carry two tensor scales. Its activations then stay in float, closer to
the 16-bit model than the file's own; the note says so. Two tensor scales meet in the smoothing, x₂ / (smooth₂ · s₁ / s₂), which changes
nothing where x₂ is not rounded.
"""

__all__ = ["halves", "joined", "stacked"]

from dataclasses import replace

import torch
from torch import Tensor

from qgen.io.peers.floats import dequantized
from qgen.io.peers.nunchaku_linear import FORMATS, Linear


def joined(left: Linear, right: Linear) -> Linear | None:
    """One layer of (N, K₁ + K₂) for two of the same N, or None if none of qgen's formats holds it."""
    same = (left.kind, left.n, left.scales.dtype) == (right.kind, right.n, right.scales.dtype)
    if not same or left.kind == "awq" or left.k % left.block:
        return None
    bias = [b.float() for b in (left.bias, right.bias) if b is not None]
    smooth = [torch.ones(part.k, dtype=part.dtype) if part.smooth is None else part.smooth for part in (left, right)]
    act, note = left.act, ""
    if left.act != right.act:
        act, note = (
            "",
            "4-bit weights kept; activations not rounded: the file rounds one half signed, the other unsigned",
        )
        bias.append(_constant(right))
    elif left.kind == "nvfp4" and not torch.equal(left.channel, right.channel):
        ratio = right.channel / left.channel
        if not bool((ratio == ratio[0]).all()) or not bool(ratio.isfinite().all()) or not bool((ratio > 0).all()):
            return None
        act, note = "", "4-bit weights kept; activations not rounded: the halves have tensor scales of their own"
        smooth[1] = smooth[1].float() / ratio[0]
    down, up = _side_by_side(left, right)
    return replace(
        left,
        k=left.k + right.k,
        codes=torch.cat([left.codes, right.codes], 1),
        scales=torch.cat([left.scales, right.scales], 1),
        act=act,
        smooth=torch.cat(smooth) if smooth[0].dtype == smooth[1].dtype else torch.cat([s.float() for s in smooth]),
        down=down,
        up=up,
        bias=sum(bias[1:], bias[0]).to(left.dtype) if bias else None,
        note=note,
    )


def halves(linear: Linear, k: int) -> tuple[Linear, Linear]:
    """Inverse of `joined` for a layer whose halves are rounded alike: the first k inputs, which get the bias, and the rest."""
    block = linear.block
    made = []
    for start, stop in ((0, k), (k, linear.k)):
        pick = {
            name: t[..., start:stop].clone() for name in ("smooth", "down") if (t := getattr(linear, name)) is not None
        }
        codes = linear.codes[:, start // 2 : -(-stop // 2)].clone()
        scales = linear.scales[:, start // block : -(-stop // block)].clone()
        bias = linear.bias if start == 0 or linear.bias is None else torch.zeros_like(linear.bias)
        made.append(replace(linear, k=stop - start, codes=codes, scales=scales, bias=bias, **pick))
    return made[0], made[1]


def stacked(linears: list[Linear]) -> Linear:
    """Layers with a common input, one below the other: what `rows` takes apart. Smoothing and down must be the same."""
    first = linears[0]
    names = ("codes", "scales", "channel", "zero", "up", "bias")
    grown = {
        name: torch.cat([getattr(part, name) for part in linears]) for name in names if getattr(first, name) is not None
    }
    return replace(first, n=sum(part.n for part in linears), **grown)


def _constant(part: Linear) -> Tensor:
    """(N,) float32: what a shifted input's bias took away."""
    return dequantized(replace(part, bias=None, dtype=torch.float32).layer("", FORMATS[part.kind]))[1]


def _side_by_side(left: Linear, right: Linear) -> tuple[Tensor | None, Tensor | None]:
    parts = [part for part in (left, right) if part.up is not None]
    if not parts:
        return None, None
    rows = []
    for part in parts:
        before, after = (0, right.k) if part is left else (left.k, 0)
        rows.append(torch.nn.functional.pad(part.down, (before, after)))
    return torch.cat(rows), torch.cat([part.up for part in parts], 1)
