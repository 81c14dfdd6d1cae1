"""Adam over named tensors: its state is plain tensors, which a checkpoint holds as they are, and can be dropped for one name."""

__all__ = ["Adam"]

from collections.abc import Mapping

import torch
from torch import Tensor


class Adam:
    """Adam with decoupled weight decay. Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101"""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.0, eps: float = 1e-12):
        self.betas, self.decay, self.eps = betas, decay, eps
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    @torch.no_grad()
    def step(
        self, leaves: Mapping[str, Tensor], grads: Mapping[str, Tensor], rates: Mapping[str, float], factor: float = 1.0
    ) -> None:
        """x ← x − factor · rate · m̂ / (√v̂ + ε), in place, for every leaf that has a gradient."""
        b, c = self.betas
        for name, grad in grads.items():
            leaf, rate = leaves[name], factor * rates[name]
            if name not in self.count:
                self.mean[name], self.square[name], self.count[name] = torch.zeros_like(leaf), torch.zeros_like(leaf), 0
            self.count[name] += 1
            t = self.count[name]
            m, v = self.mean[name].lerp_(grad, 1 - b), self.square[name].mul_(c).addcmul_(grad, grad, value=1 - c)
            if self.decay:
                leaf.mul_(1 - rate * self.decay)
            leaf.addcdiv_(m, (v / (1 - c**t)).sqrt_().add_(self.eps), value=-rate / (1 - b**t))

    def forget(self, name: str) -> None:
        """Starts anew for a tensor that was replaced."""
        for table in (self.mean, self.square, self.count):
            table.pop(name, None)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for `restore`."""
        made = {f"mean/{name}": t for name, t in self.mean.items()} | {f"square/{n}": t for n, t in self.square.items()}
        return made | {f"count/{name}": torch.tensor(n) for name, n in self.count.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for key, t in state.items():
            kind, _, name = key.partition("/")
            if kind == "count":
                self.count[name] = int(t)
            else:
                (self.mean if kind == "mean" else self.square)[name] = t.clone()
