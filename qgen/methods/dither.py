r"""Temporal dither: inputs are moved by a little at each timestep, each time by something else, so that rounding errors do not add up.

    x Wᵀ = (x + u_b δ) Wᵀ − u_b δ Wᵀ,     u_b in [−1, 1) by the bin b of the timestep,  δ_k = ± a · step

A token hardly changes from one step to the next, so that it is rounded to the same codes, and its error, always the same, adds up along the
trajectory as the sampler adds the steps. Where the grid lies a little elsewhere at each step the errors differ and average out: of single
steps they are no smaller, of their sum they are. What is added is taken off again by the bias, in floats. Offsets u follow the golden
ratio, so that neighbouring steps, every second of them, and those of other schedulers all differ. It takes one row of the input's width and
one of the output's, see `qgen.timed`.

This is subtractive dither along sampling in place of along a signal: Lipshitz, Wannamaker, Vanderkooy, 1992,
http://robertwannamaker.com/abstracts/aes_survey.html
"""

__all__ = ["Dither", "along"]

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qgen.calibration.timeline import GOLDEN
from qgen.kernels.reference import hadamard_blocks
from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("dither")
@dataclass(frozen=True)
class Dither:
    """Lowers the error of a run's sum of outputs. Stands after all that rounds, before `temporal-bias`. Does nothing with one bin.

    amplitudes: a, in steps of the activation grid, of which each layer takes the one with the smallest error along the trajectory; none
    where that falls by less than `worth` of it, or by no more than twice its standard error over the tokens. steps: so many steps' errors
    are taken to add up, fewer than most runs have, as what a token is changes in the course of one.
    """

    name: ClassVar[str] = "dither"
    amplitudes: tuple[float, ...] = (0.5, 1.0, 2.0)
    steps: int = 10
    worth: float = 0.03

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.amplitudes or not all(a > 0 for a in self.amplitudes) or not 0 <= self.worth < 1:
            found = f"{self.amplitudes}, {self.steps}, {self.worth}"
            raise ValueError(
                f"amplitudes are positive, a run has a step, and what is worth it is a share: found {found}"
            )

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "moments", "paths"} if site.kind == "linear" else {"rows", "moments"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        if stats.path_bins is None or not draft.act:
            return draft
        draft = replace(draft.rounded(), dither=None, offsets=None)
        u = (torch.arange(len(draft.edges) + 1, device=draft.weight.device) * GOLDEN) % 1 * 2 - 1
        u = torch.cat([u, u.new_zeros(1)])  # without a timestep nothing is moved
        pattern = self._pattern(draft, stats)
        trials = [draft, *(replace(draft, dither=a * pattern, offsets=u) for a in self.amplitudes)]
        steps = min(self.steps, len(draft.edges) + 1)  # a run has no more of them than there are timesteps
        errors = [along(trial, stats.paths, stats.path_bins, steps) for trial in trials]
        means = [float(error.mean()) for error in errors]
        chosen = min(range(len(trials)), key=means.__getitem__)
        gain = errors[0] - errors[chosen]
        chance = float(gain.std(correction=0)) / len(gain) ** 0.5
        if float(gain.mean()) <= max(self.worth * means[0], 2 * chance):
            chosen = 0
        told = {"dithered": (0.0, *self.amplitudes)[chosen], "along": f"{means[0]:.3g} -> {means[chosen]:.3g}"}
        return trials[chosen].noted(**told)

    def _pattern(self, draft: Draft, stats: Stats) -> Tensor:
        """(K,): a step of the activation grid at each channel, of random sign, in the raw basis."""
        x = stats.fit[:1024]
        bins = None if stats.fit_bins is None else stats.fit_bins[:1024]
        lost = (draft.inputs(x, bins=bins) - draft.inputs(x, quantized=False)).square().mean(0)  # a step² / 12
        sign = torch.randint(0, 2, lost.shape, generator=torch.Generator().manual_seed(stats.seed)) * 2 - 1
        made = (12 * lost).sqrt() * sign.to(lost)
        made = (hadamard_blocks(made[None], draft.hadamard)[0] if draft.hadamard else made)[: draft.weight.shape[1]]
        return made if draft.smooth is None else made * draft.smooth


def along(draft: Draft, paths: Tensor, bins: Tensor, steps: int) -> Tensor:
    """Squared error of the sum of each token's outputs over `steps` steps, for one of them, relative to the mean energy of an output: (P,).

    paths: (P, S, K), centred where the draft is. bins: (P, S). With p the mean square of a token's error and c the mean product of its
    errors at two different steps it is p + (steps − 1) c. The mean error, which a bias takes off, is not counted.
    """
    rows, owner = paths.flatten(0, 1), bins.flatten()
    energy = (rows @ draft.weight.T).square().sum(-1).mean().clamp_min(1e-30)
    rows = draft.moved(rows, owner)
    error = draft.lost(rows, owner)
    error = (error - error.mean(0)).unflatten(0, paths.shape[:2])
    single = error.square().sum(-1).mean(1)
    summed = error.sum(1).square().sum(-1)
    s = paths.shape[1]
    return (single + (steps - 1) * (summed - s * single) / (s * (s - 1))) / energy
