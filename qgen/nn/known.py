r"""Known rows: inputs that are the same for every prompt, each with the output that the float layer has for it.

    y_m = known_y_p   where ‖x_m − known_x_p‖ ≤ tol ‖known_x_p‖ for one of the P known rows,      y_m = op(x_m)   elsewhere

CLIP's first token, the start token, sees itself alone: its row of the text is the same in every prompt, and so large that a scale which
covers it leaves a handful of levels to all other rows. Its output is computed once, in floats, and neither the row nor its range ever meets
a quantizer. Two slots beside those of the op: known_x (P, K) and known_y (P, N), which follow `.to(dtype)` as a bias does.

Rows are recognized by what they hold and not by where they stand: prompts of several windows have several start tokens, and a negative
prompt of zeros, or tokens of an image, have none. Every row runs through the op as ever, so that layers that read one input still share
its codes (`qgen.nn.kept`), and one graph serves whatever comes. A layer without known rows does none of this.
The start token apart: MixDQ, Zhao et al., 2024, https://arxiv.org/abs/2405.17873
"""

__all__ = ["KNOWN", "among", "apply", "same", "tolerance"]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgen import formats

KNOWN = ("known_x", "known_y")  # slots of a layer, beside those of its op


def tolerance(*dtypes: torch.dtype) -> float:
    """How far apart two rows of these dtypes may be, as a share of their length, to be called the same.

    An encoder does not give the same bits everywhere: one of CLIP's size (12 layers of 768, random weights) moves its start token by 1.1 %
    in bfloat16 and by 0.5 % in float16, where the second token of two prompts is 38 % apart (printed by the last test of
    `tests/methods/test_start_token.py`).
    """
    return max(1e-3, 8 * max(torch.finfo(dtype).eps for dtype in dtypes))


def same(x: Tensor, row: Tensor) -> Tensor:
    """Which rows of x (…, K) are `row` (K,), but for `tolerance`: (…,) bool. NaN is never the same."""
    apart = (x.float() - row.float()).square().sum(-1)
    return apart <= tolerance(x.dtype, row.dtype) ** 2 * row.float().square().sum()


def among(x: Tensor, rows: Tensor) -> Tensor:
    """Which rows of x (…, K) are one of `rows` (P, K): (…,) bool."""
    return torch.stack([same(x, row) for row in rows]).any(0)


def apply(layer: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run(x)` of a packed layer for x (…, K), with the stored outputs where x is known."""
    hits = [same(x, row) for row in layer.known_x]
    if layer.act_format and formats.get(layer.act_format).global_scale == "tensor":
        x = x.masked_fill(torch.stack(hits).any(0)[..., None], 0)  # or all other rows would be scaled by them
    y = run(x)
    for hit, output in zip(hits, layer.known_y, strict=True):
        y = torch.where(hit[..., None], output.to(y), y)
    return y
