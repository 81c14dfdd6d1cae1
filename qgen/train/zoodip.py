r"""ZOODiP: a new token for a quantized model, learned without a backward pass: the weights stay packed, the memory is that of inference.

    g = Σ_i (L(v + ε z_i) − L(v)) / ε · z_i / (n √((d + n − 1) / n)),    i = 1 … n

for one embedding v (d,): n probes and the base share the call, the noise and the timestep. The estimate is noise in most of d directions.
So the last τ values of v are kept; the directions in which they moved (components of least variance that make up ν of it are rejected)
span the subspace that gradients are projected on for the next τ steps. Timesteps are drawn from the part of the trajectory where the text
matters. An Adam step follows, and v is brought back to the length that it began with.

The paper standardizes each coordinate before the components are sought, which makes noise as important as signal; here the covariance is
taken raw unless `standardize` asks otherwise.
Kim et al., 2025, https://arxiv.org/abs/2503.14868
"""

__all__ = ["Subspace", "draw_times", "estimate", "invert"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qgen.train.adam import Adam


@torch.no_grad()
def estimate(
    loss: Callable[[Tensor], Tensor | float], v: Tensor, generator: torch.Generator, probes: int = 2, eps: float = 1e-3
) -> Tensor:
    """Estimate (d,) of the gradient of `loss` at v (d,), of its length by the factor above. The loss must give equal values for equal v."""
    base, d = float(loss(v)), v.numel()
    g = torch.zeros_like(v)
    for _ in range(probes):
        z = torch.randn(v.shape, generator=generator, dtype=v.dtype).to(v.device)
        g.add_(z, alpha=(float(loss(v + eps * z)) - base) / eps)
    return g / (probes * math.sqrt((d + probes - 1) / probes))


class Subspace:
    """Keeps the last `tau` values of a vector and, when they are full, the directions in which it moved."""

    def __init__(self, tau: int = 128, nu: float = 1e-3, standardize: bool = False):
        self.tau, self.nu, self.standardize = tau, nu, standardize
        self.seen: list[Tensor] = []
        self.basis: Tensor | None = None  # (d, kept), orthonormal

    def push(self, v: Tensor) -> None:
        self.seen.append(v.detach().clone())
        if len(self.seen) == self.tau:
            x = torch.stack(self.seen).double()
            x = x - x.mean(0)
            if self.standardize:
                x = x / x.std(0).clamp_min(1e-12)
            _, s, vh = torch.linalg.svd(x, full_matrices=False)
            share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
            kept = int((share < 1 - self.nu).sum()) + 1
            self.basis, self.seen = vh[:kept].T.to(v.dtype), []

    def project(self, g: Tensor) -> Tensor:
        """The part of g (d,) in the directions that are kept; all of it until the first are known."""
        return g if self.basis is None else self.basis @ (self.basis.T @ g)


def draw_times(count: int, generator: torch.Generator, low: float = 500.0, high: float = 900.0) -> Tensor:
    """(count,) timesteps, uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator)


@torch.no_grad()
def invert(
    loss: Callable[[Tensor, int], Tensor | float],
    start: Tensor,
    steps: int = 2000,
    rate: float = 1e-2,
    probes: int = 2,
    eps: float = 1e-3,
    subspace: Subspace | None = None,
    keep_length: bool = True,
    seed: int = 0,
    progress: Callable = lambda items, **_: items,
) -> Tensor:
    """The embedding (d,) float32 learned from `start`.

    Arguments:
        loss: of an embedding and the number of the step. It chooses its call, noise and timestep by that number, so that a step's probes
            share them, and runs the quantized model as it is.
        subspace: default 128 values and a thousandth of their variance rejected.
        keep_length: v keeps the norm of `start`.

    FloatingPointError if the loss is no number.
    """
    generator, subspace = torch.Generator().manual_seed(seed), subspace or Subspace()
    v, length = start.detach().float().clone(), float(start.float().norm())
    adam = Adam(betas=(0.9, 0.999), eps=1e-3)
    for step in progress(range(steps), desc="invert", total=steps):
        g = subspace.project(estimate(lambda at, step=step: loss(at, step), v, generator, probes, eps))
        if not bool(torch.isfinite(g).all()):
            raise FloatingPointError(f"the loss of step {step} is no number; a smaller rate or eps may help")
        adam.step({"v": v}, {"v": g}, {"v": rate})
        if keep_length:
            v.mul_(length / v.norm().clamp_min(1e-12))
        subspace.push(v)
    return v
