r"""Denoising-factor alignment: each call weighs as much as the sampler lets its error through to the next latents.

    x_{t−1} = a_t x_t + c_t ε(x_t, t) + noise        ‖x_{t−1} of the student − x_{t−1} of the teacher‖² = c_t² ‖ε_s − ε_t‖²

So a loss weighted by c_t² is the squared error of what the sampler makes of the student's answer, at the student's and teacher's common
x_t. c_t is not derived for each scheduler, but seen: a step of the scheduler itself from x = 0, with the answers 0 and 1 in turn. That
serves any sampler whose step is linear in the answer, whatever the answer means (ε, x_0, v, a velocity), multistep ones included.

Methods of fine-tuning measure ‖ε_s − ε_t‖² / ‖ε_t‖². Where the answer has the same energy at all timesteps, as a prediction of noise has,
that is the same but for one factor. MSFP, Zhao et al., 2025, https://arxiv.org/abs/2505.21591
"""

__all__ = ["factors", "weights"]

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgen.calibration.base import Moment

_PROBE = 1e-3  # an answer so small that samplers which clip their estimate of the picture do not


def factors(scheduler: Any, steps: int, step: dict | None = None, **options: Any) -> dict[float, float]:
    """{timestep: c_t} of a diffusers scheduler that is set to so many steps. The given one is left as it is.

    Arguments:
        step: further arguments of the scheduler's `step`, such as {"eta": 1.0}. options: of its `set_timesteps`, such as mu=0.5.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **options)
    return {float(t): _factor(scheduler, t, step or {}) for t in scheduler.timesteps}


def weights(
    scheduler: Any, steps: int, step: dict | None = None, told: float = 1.0, **options: Any
) -> Callable[[Moment], float]:
    """c_t² of a call by its Moment, for `qgen.finetune(weight=…)`. A call between two timesteps weighs what the nearer one does.

    Arguments:
        told: what the denoiser is told in units of the scheduler's timestep: 0.001 for those that are told t / 1000 (Flux).
        steps, step, options: see `factors`.

    The weight raises ValueError for a call without a timestep.
    """
    table = {t * told: c * c for t, c in factors(scheduler, steps, step, **options).items()}

    def weight(moment: Moment) -> float:
        if moment.t is None:
            raise ValueError(f"weights by the sampler's factors want calls with a timestep, found {moment}")
        return table[min(table, key=lambda t: abs(t - moment.t))]

    return weight


def _factor(scheduler: Any, t: Tensor, options: dict) -> float:
    """c_t; the scheduler goes on by one step, with the answer 0."""
    other = copy.deepcopy(scheduler)
    return (_stepped(other, _PROBE, t, options) - _stepped(scheduler, 0.0, t, options)) / _PROBE


def _stepped(scheduler: Any, answer: float, t: Tensor, options: dict) -> float:
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if "generator" in inspect.signature(scheduler.step).parameters:  # the same noise in both
        options = {**options, "generator": torch.Generator().manual_seed(0)}
    x = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    return float(scheduler.step(torch.full_like(x, answer), t, x, **options, return_dict=False)[0])
