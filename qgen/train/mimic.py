r"""LowRankMimic: the student's features are drawn to the teacher's in the directions in which the teacher's vary most.

    loss = weight · Σ over blocks  ‖Kᵀ f_s − Kᵀ f_t‖²,     K (C, C/4) = principal directions of f_t over channels

Features of a coarsely quantized block differ from the teacher's in all directions; most of them are noise, and following it helps nobody.
K comes from the teacher's answers to a first batch, eight calls along the trajectory, and stays. Channels are the last axis of features
(B, tokens, C) and the second of images and videos (B, C, H, W): taken over the width, as published code does, K holds nothing of the kind.

The norm is that of a sample, summed over its positions, as in the paper, so that `weight` acts the stronger the larger the features are.
BinaryDM, Zheng et al., 2024, https://arxiv.org/abs/2404.05662
"""

__all__ = ["LowRankMimic", "principal"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qgen.train.features import Features
from qgen.train.units import units_of

if TYPE_CHECKING:
    from qgen.train.distill import Lessons
    from qgen.train.student import Student

_FIRST = 8  # calls of which K is made


@dataclass(frozen=True)
class LowRankMimic:
    """A term for any method that trains by the teacher's answers: `Full(terms=(LowRankMimic(),))`. weight: see above. share: of the
    channels that K keeps."""

    weight: float = 1e-4
    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is in (0, 1], found {self.share}")

    def begin(self, student: "Student", lessons: "Lessons") -> "_Mimic":
        """The term at work. ValueError without a teacher."""
        first = lessons.few(_FIRST).fit
        blocks = units_of(student, (lessons.calls[i] for i in first))
        paths = [unit.path for unit in blocks if len(unit.twins) > 1]
        if not paths:
            raise ValueError(
                "no block of the model has two quantized layers, there is nothing to mimic: leave this term out"
            )
        return _Mimic(self.weight, self.share, Features(student.module, lessons, paths), first)


class _Mimic:
    def __init__(self, weight: float, share: float, features: Features, first: list[int]):
        self.weight, self.features = weight, features
        seen: dict[tuple[str, int], list[Tensor]] = {}
        for number in first:
            for path, given in features.want(number).items():
                for i, t in enumerate(given):
                    seen.setdefault((path, i), []).append(channels(t).float().flatten(0, -2).cpu())
        self.basis = {key: principal(torch.cat(rows), share) for key, rows in seen.items()}

    def loss(self, number: int, done: float) -> Tensor:
        want, lost = self.features.want(number), []
        for path, given in self.features.take().items():
            for i, (got, t) in enumerate(zip(given, want[path], strict=True)):
                basis = self.basis[path, i].to(got.device)
                apart = (channels(got).float() - channels(t).float().to(got.device)) @ basis
                lost.append(apart.square().sum() / len(got))
        return self.weight * torch.stack(lost).sum()

    def close(self) -> None:
        self.features.close()


def channels(f: Tensor) -> Tensor:
    """Features with their channels as the last axis."""
    return f.movedim(1, -1) if f.ndim > 3 else f


def principal(rows: Tensor, share: float) -> Tensor:
    """(C, share · C), orthonormal: the directions in which rows (M, C) vary most around their mean."""
    rows = rows.double()
    _, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))  # ascending
    return vectors[:, -max(1, round(share * rows.shape[1])) :].flip(1).float()
