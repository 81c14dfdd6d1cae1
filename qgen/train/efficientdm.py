r"""EfficientDM: low-rank updates that are merged before the weight is rounded, so that they end in the integers.

    Ŵ = Q(W + B A),    A (r, K), B (N, r) = 0 at first;    rate of A and B in each layer = rate · mean step of its grid

An update much smaller than a step never changes a code, one larger makes it jump: the useful rate is proportional to the step. Steps of
weights are learned too, and static activation scales with their bins of timesteps (TALSQ), which the clock selects by the scheduler's
timestep per sample and never by counting calls. Loss: the denoiser's output against the 16-bit one's on the latter's own trajectory.

The paper's rate is 1 / 2500 for 16000 steps. The default here is for hundreds of steps.
He et al., 2024, https://arxiv.org/abs/2310.03270
"""

__all__ = ["EfficientDM"]

from dataclasses import dataclass

import torch

from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.full import open_weights
from qgen.train.student import Student


@tunings.register("efficientdm")
@dataclass(frozen=True)
class EfficientDM(Tuning):
    """rate: of A and B, in mean steps of the layer's grid. rank: r. scale_rate, step_rate: of logarithms of weights' and inputs' scales."""

    rate: float = 0.05
    rank: int = 32
    scale_rate: float = 2e-4
    step_rate: float = 5e-4

    name = "efficientdm"

    def open(self, student: Student, lessons: Lessons) -> None:
        generator = torch.Generator().manual_seed(0)
        for twin in open_weights(student, 0.0, 0.0):
            n, k = twin.leaves["master"].shape
            rank, rate = min(self.rank, n, k), self.rate * twin.mean_step
            twin.open(
                "lora_a", ((torch.rand(rank, k, generator=generator) * 2 - 1) / k**0.5).to(twin.leaves["master"]), rate
            )
            twin.open("lora_b", torch.zeros_like(twin.leaves["master"][:, :rank]), rate)
            twin.leaves["master"].requires_grad_(False)
            twin.open_scale(self.scale_rate)
            twin.open_steps(self.step_rate)
