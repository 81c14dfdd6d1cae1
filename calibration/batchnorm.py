r"""Images from the statistics that batch norms keep: calibration of a convolutional net without any data. ZeroQ.

A batch norm remembers mean μ̂ and deviation σ̂ of each channel of what it read in training. Images that make its input look like that again
are found by descent on the images themselves, from noise:

    min over x   Σ_norms mean_c [(μ_c(x) − μ̂_c)² + (σ_c(x) − σ̂_c)²] / σ̂_c²  +  mean_i [μ_i(x)² + (σ_i(x) − 1)²]

The last term keeps each image i itself at mean 0 and deviation 1, as nets take them. Group and layer norms keep no statistics, so that for
denoisers the trajectory from noise is the data, see `recorder`. This serves codecs, critics and encoders with batch norms.
Cai et al., 2020, https://arxiv.org/abs/2001.00281
"""

__all__ = ["BatchNormMatch", "mismatch"]

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qgen.calibration.base import CalibrationSet, Call, Moment, calibrators


@calibrators.register("batchnorm")
@dataclass(frozen=True)
class BatchNormMatch:
    """`images` images of `shape` (C, H, W), all matched together: few would each have to look like all.

    steps, rate: of Adam; the rate falls to a tenth where the loss stands still. batch: images in a call. held: share of calls held out.
    """

    shape: tuple[int, ...]
    images: int = 64
    steps: int = 500
    rate: float = 0.5
    batch: int = 8
    held: float = 0.2

    def calls(
        self,
        pipe: Any,
        denoisers: dict[str, nn.Module],
        prompts: Sequence[str] | None = None,
        call_kwargs: dict | None = None,
        seed: int = 0,
        progress: Callable = lambda items, **_: items,
    ) -> dict[str, CalibrationSet]:
        """Calls of each module with its images as the one argument. ValueError for one without statistics. Prompts say nothing here."""
        made = {}
        for name, module in denoisers.items():
            images = self.draw(module, seed, progress)
            calls = [Call((x,), dict(call_kwargs or {}), Moment(i)) for i, x in enumerate(images.split(self.batch))]
            origin = f"batch norms: {self.images} images matched to their statistics"
            made[name] = CalibrationSet(tuple(calls), origin).hold_out(self.held)
        return made

    def draw(self, module: nn.Module, seed: int = 0, progress: Callable = lambda items, **_: items) -> Tensor:
        """The images, (images, *shape) float32 on the CPU. ValueError for a module without statistics."""
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        noise = torch.randn(self.images, *self.shape, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode(False), torch.enable_grad():
            x = noise.to(device).requires_grad_()
            adam = torch.optim.Adam([x], lr=self.rate)
            fall = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.1, patience=max(1, self.steps // 10))
            for _ in progress(range(self.steps), desc="match batch norms", total=self.steps):
                loss = mismatch(module, x, dtype)
                (x.grad,) = torch.autograd.grad(loss, x)  # the module's parameters get none
                adam.step()
                fall.step(loss.detach())
        return x.detach().cpu()


def mismatch(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """() how far images x (B, C, H, W) are from what the module's batch norms remember. ValueError if none remembers anything."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise ValueError(
            f"{type(module).__name__} has no batch norm with running statistics, which images could be matched to: "
            "record calls of the pipeline it belongs to, or pass some"
        )
    each = x.float().flatten(1)
    total = each.mean(1).square().mean() + (each.std(1) - 1).square().mean()
    for norm, seen in _read(module, norms, x.to(dtype)):
        rows = seen.float().transpose(0, 1).flatten(1)  # (channels, …)
        mean, deviation = norm.running_mean.float(), (norm.running_var.float() + norm.eps).sqrt()
        off = (rows.mean(1) - mean).square() + (rows.std(1, correction=0) - deviation).square()
        total = total + (off / deviation.square()).mean()
    return total


def _read(module: nn.Module, norms: list[nn.Module], x: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Each norm with what it reads of x, with gradients; running statistics stay as they are."""
    seen: list[tuple[Any, Tensor]] = []
    with contextlib.ExitStack() as stack:
        for norm in norms:
            hook = norm.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))
            stack.callback(hook.remove)
        for m in module.modules():
            if m.training:  # a norm in training would learn from noise
                m.training = False
                stack.callback(setattr, m, "training", True)
        module(x)
    yield from seen
