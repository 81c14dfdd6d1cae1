"""Paths: the rows of a few tokens at every recorded step of their run, where a reservoir takes other tokens at each step.

What rounding does to one token at one step says nothing of the next step: errors that are alike at all of them add up along the
trajectory, others average out. Only rows of the same token tell the two apart.
"""

__all__ = ["Paths"]

import torch
from torch import Tensor

from qgen.calibration.base import Moment
from qgen.calibration.observers import Reservoir


class Paths(Reservoir):
    """A uniform sample of tokens, in all about `rows` rows of the calls that fit and a quarter as many of those held out.

    A token is a row's place in the calls of its sample: they must have as many rows at each step.
    """

    def _drawn_by(self, moment: Moment) -> str:
        return f"{self.seed}/{moment.sample}{moment.branch}"

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """Rows (P, S, K) float32 of tokens that were seen at S timesteps, held out or not, and these timesteps (P, S) float32.

        S is the number of steps that most of the rows kept belong to; tokens of which fewer were kept are left out. None if S is 1.
        """
        sides = [kept for kept in self._kept.values() if kept is not None]
        if not sides:
            return None
        keys, x, t = (torch.cat(parts) for parts in zip(*sides, strict=True))
        order = t.argsort(stable=True)  # by token, and each one's by time, in whatever order the calls came
        order = order[keys[order].argsort(stable=True)]
        count = keys[order].unique_consecutive(return_counts=True)[1]
        steps = int(count.repeat_interleave(count).mode().values)
        if steps < 2:
            return None
        full = (count == steps).repeat_interleave(count)
        order = order[full].reshape(-1, steps)
        return x[order.to(x.device)].float(), t[order].float()
