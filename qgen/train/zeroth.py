r"""Gradients without a backward pass: the loss at two points that differ by noise tells how steep it is along that noise.

    d = (L(θ + ε z) − L(θ − ε z)) / 2ε ≈ ⟨∇L, z⟩,     z ~ N(0, 1),     θ ← θ − rate · clip(d, ±C) · z

z is made from a seed wherever it is needed, one tensor at a time, and never kept: memory is that of inference. θ is float32 and only
ever changed by the last formula, never by adding noise and taking it away again, which would drift.
MeZO, Malladi et al., 2023, https://arxiv.org/abs/2305.17333 · QZO, Shang et al., 2025, https://arxiv.org/abs/2505.13430
"""

__all__ = ["Probe", "descend", "slope"]

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class Probe:
    """Adds noise to tensors while an estimate is going on. Called with a name and a tensor it gives the tensor, plus `size` · z."""

    def __init__(self) -> None:
        self.seed, self.size = 0, 0.0

    def __call__(self, name: str, t: Tensor) -> Tensor:
        return t if not self.size else t + self.size * self.noise(name, t)

    def noise(self, name: str, like: Tensor) -> Tensor:
        """z of a tensor: the same for the same seed and name, whatever else is asked for, on any device."""
        word = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:6], "little")
        generator = torch.Generator().manual_seed(word)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


@torch.no_grad()
def slope(loss: Callable[[], Tensor | float], probe: Probe, seed: int, eps: float) -> tuple[float, float]:
    """(d, mean of the two losses) along the noise of `seed`; `loss` reads its tensors through `probe`."""
    probe.seed = seed
    try:
        probe.size = eps
        high = float(loss())
        probe.size = -eps
        low = float(loss())
    finally:
        probe.size = 0.0
    return (high - low) / (2 * eps), (high + low) / 2


@torch.no_grad()
def descend(
    leaves: Mapping[str, Tensor], probe: Probe, seed: int, d: float, rates: Mapping[str, float], clip: float
) -> None:
    """One step along the noise of `seed`, in place. clip: C, 0 = none."""
    probe.seed = seed
    d = max(-clip, min(clip, d)) if clip else d
    for name, leaf in leaves.items():
        leaf.sub_(probe.noise(name, leaf), alpha=rates[name] * d)
