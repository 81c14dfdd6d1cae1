r"""QVGen: a float branch beside each weight makes the start easy and is gone at the end.

    y = Q(x) Q(W)ᵀ + Φ(Q(x)),    Φ = L diag(γ) R,    L R = the first r singular parts of W − Q(W) at the start

Training from a coarse grid has large gradients because the error is large; Φ takes most of it away. It then fades: in each phase the gates
γ of the first half of the ranks stay 1, those of the other half go 1 → 0 along a cosine. When they are exactly 0 they are dropped, what is
left is put in order of importance by another SVD, and the next phase halves it again: r → r/2 → … → 1 → 0, log₂ r + 1 phases. The rest of
the steps trains the plain layer. Held-out looks are without Φ, so early ones say little.

The paper's clipping factors of activations measured at run time are left out: formats here have no such factor. Static activation scales
are learned by bins of timesteps, found by the same clock in training and use.
Huang et al., 2025, https://arxiv.org/abs/2505.11497
"""

__all__ = ["QVGen"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.train.adam import Adam
from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.full import open_weights
from qgen.train.student import Student
from qgen.train.twin import Twin


@tunings.register("qvgen")
@dataclass(frozen=True)
class QVGen(Tuning):
    """rate: of weights, in steps of their grid. rank: r, a power of two. fading: share of the steps in which Φ fades. branch_rate: of L and
    R, in units of their mean magnitude. scale_rate: of the logarithm of scales."""

    rate: float = 0.01
    rank: int = 32
    fading: float = 0.75
    branch_rate: float = 1e-2
    scale_rate: float = 5e-4

    name = "qvgen"
    betas = (0.9, 0.95)
    decay = 1e-4

    def __post_init__(self) -> None:
        if self.rank < 1 or self.rank & (self.rank - 1) or not 0 < self.fading <= 1:
            raise ValueError(
                f"rank is a power of two and fading in (0, 1], found rank={self.rank}, fading={self.fading}"
            )

    def schedule(self, done: float) -> float:
        return min(1.0, 10 * done + 0.1) * 0.5 * (1 + math.cos(math.pi * done))

    def open(self, student: Student, lessons: Lessons) -> None:
        for twin in open_weights(student, self.rate, self.scale_rate):
            gap = twin.leaves["master"].detach() if (w := twin.wanted()) is None else w
            branch = _parts(gap - twin.weight().detach(), self.rank)
            for name, value in zip(("aux_l", "aux_r"), branch, strict=True):
                twin.open(name, value, self.branch_rate * max(float(value.abs().mean()), 1e-9))

    def before(self, student: Student, step: int, steps: int, adam: Adam) -> None:
        if steps <= (phases := self.rank.bit_length()):
            raise ValueError(
                f"a branch of rank {self.rank} fades in {phases} phases, which takes more than {steps} steps"
            )
        length = max(1, int(self.fading * steps / phases))
        phase, inside = divmod(step, length)
        keep = self.rank >> phase
        for path, twin in student.twins.items():
            if "aux_l" not in twin.leaves:
                continue
            if twin.leaves["aux_l"].shape[1] > keep:
                self._shrink(twin, keep)
                adam.forget(f"{path}:aux_l")
                adam.forget(f"{path}:aux_r")
            if keep:
                twin.gate = self._gates(twin.leaves["aux_l"].shape[1], keep // 2, (inside + 1) / length, twin)

    def _gates(self, rank: int, stay: int, done: float, twin: Twin) -> Tensor:
        gate = torch.ones(rank, device=twin.leaves["aux_l"].device)
        gate[stay:] = 0.5 * (1 + math.cos(math.pi * done)) if done < 1 else 0.0
        return gate

    def _shrink(self, twin: Twin, keep: int) -> None:
        """Drops the ranks whose gates have come to 0, and orders the rest anew; at `keep` = 0 the branch is gone."""
        twin.gate = None
        if not keep:
            twin.close("aux_l")
            twin.close("aux_r")
            return
        left, right = twin.leaves["aux_l"].detach()[:, :keep], twin.leaves["aux_r"].detach()[:keep]
        for name, value in zip(("aux_l", "aux_r"), _parts(left @ right, keep), strict=True):
            twin.open(name, value, twin.rates[name])


def _parts(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (N, r) and R (r, K) of the first r singular parts of w (N, K), the singular values shared between them."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()
