r"""Is what was measured on two sets of pictures more than chance? Deal the pictures out again and see.

    excess = s(x, y) - s(x', y'),      x', y' = both sets thrown together and dealt out at random into sets of the old sizes

If both sets come from one source, s(x, y) is one such deal like any other, so 95 times of 100 the middle 95 % of the excess holds
zero: however few pictures there are, and however biased s is. Pictures of the same prompts are dealt in pairs: for each prompt a coin
says which side gets which, so that prompts which differ from each other say nothing about the models.

Fisher, 1935, "The Design of Experiments"; Good, 2005, "Permutation, Parametric, and Bootstrap Tests of Hypotheses",
https://doi.org/10.1007/b138696
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qgen.eval.bootstrap import Interval

__all__ = ["excess"]

LEAST = 39  # so many deals put the middle 95 % between the least and the greatest


def excess(
    statistic: Callable[[Tensor, Tensor], float],
    x: Tensor,
    y: Tensor,
    *,
    paired: bool = False,
    draws: int = 199,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval]:
    """Returns s(x, y), and its mean excess over chance with the interval, for features (n, K) and (m, K).

    paired: row i of both belongs to one prompt. n of the interval is the smaller set's. Raises ValueError for too few draws, and for
    pairs of unequal number; what `statistic` raises passes through.
    """
    if draws < LEAST:
        raise ValueError(f"at least {LEAST} draws wanted, found {draws}")
    if paired and len(x) != len(y):
        raise ValueError(f"pairs wanted, found {len(x)} and {len(y)} rows")
    found, generator, n = statistic(x, y), torch.Generator().manual_seed(seed), len(x)
    pool = torch.cat([x, y])
    others = []
    for _ in range(draws):
        if paired:
            swap = (torch.rand(n, 1, generator=generator) < 0.5).to(x.device)
            others.append(statistic(torch.where(swap, y, x), torch.where(swap, x, y)))
        else:
            order = torch.randperm(len(pool), generator=generator)
            others.append(statistic(pool[order[:n]], pool[order[n:]]))
    over = found - torch.tensor(others, dtype=torch.float64).sort(descending=True).values
    edge = round((1 - level) / 2 * (draws + 1)) - 1  # of draws + 1 places that `found` may take among the others
    return found, Interval(float(over.mean()), float(over[edge]), float(over[-1 - edge]), min(len(x), len(y)), level)
