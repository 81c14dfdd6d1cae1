"""A latency table: the time of one layer in each format, measured where the model is.

Each distinct (shape, tokens, format) is timed once, on random rows: the median of several runs after a warm-up. Layers of one call of the
denoiser add up; what lies between them (attention, norms) is the same for every choice and not counted.
"""

__all__ = ["Stopwatch"]

import statistics
import time

import torch
from torch import nn

from qgen.nn.packed import Packed
from qgen.site import Site


class Stopwatch:
    """Callable with (layer, site): seconds of one run on as many rows as the probe saw at the site. runs: of which the median counts."""

    def __init__(self, runs: int = 7):
        self.runs = runs
        self.known: dict[tuple, float] = {}

    def __call__(self, layer: nn.Module, site: Site) -> float:
        kind = layer.described() if isinstance(layer, Packed) else str(next(layer.parameters()).dtype)
        key = (site.kind, site.shape, site.tokens, str(kind))
        if key not in self.known:
            self.known[key] = self._time(layer, _input(layer, site))
        return self.known[key]

    @torch.no_grad()
    def _time(self, layer: nn.Module, x: torch.Tensor) -> float:
        wait = torch.cuda.synchronize if x.is_cuda else lambda: None
        found = []
        for _ in range(self.runs + 2):
            wait()
            start = time.perf_counter()
            layer(x)
            wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found[2:])


def _input(layer: nn.Module, site: Site) -> torch.Tensor:
    """Random input of the layer's shape: (tokens, K), or a square picture with about as many places."""
    like = layer.codes if isinstance(layer, Packed) else layer.weight
    dtype = layer.compute_dtype if isinstance(layer, Packed) else layer.weight.dtype
    rows = max(1, site.tokens)
    if site.kind == "conv2d":
        side = max(1, round(rows**0.5)) * max(layer.stride)
        return torch.randn(1, layer.in_channels, side, side, device=like.device, dtype=dtype)
    return torch.randn(rows, site.shape[1], device=like.device, dtype=dtype)
