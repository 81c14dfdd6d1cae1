r"""Zero-shot calibration: no prompt and no data, noise in place of latents and random conditioning in place of texts.

One call shows what a denoiser takes. Of its arguments

    latents        the first argument: ε ~ N(0, 1), what sampling starts from, at timesteps spread over the whole range
    conditioning   other floating tensors: N(μ, σ) with the mean and deviation of each channel (the last axis) in the call that was seen
    timestep       as told
    the rest       as it was: positions, masks, sizes

Latents of late steps are no noise, so that ranges are only roughly those of real use: a recorded set is better wherever there is one.
The idea of made-up data that follows known statistics is ZeroQ's, Cai et al., 2020, https://arxiv.org/abs/2001.00281, and GENIE's, Jeon et
al., 2023, https://arxiv.org/abs/2212.04780, which learn their data; here it is drawn.
"""

__all__ = ["Synthetic"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment, _map, _maskish, calibrators
from qgen.calibration.prompts import PROMPTS
from qgen.calibration.recorder import Recorder, as_calls
from qgen.calibration.timeline import unit_of
from qgen.nn.clock import NAMES


@calibrators.register("synthetic")
@dataclass(frozen=True)
class Synthetic:
    """`samples` made-up draws of `steps` calls each.

    example: a call of a bare module, as `quantize` takes one; a pipeline shows one itself, by a draw of one step. held: share of draws
    held out.
    """

    samples: int = 32
    steps: int = 8
    held: float = 0.2
    example: Any = None

    def calls(
        self,
        pipe: Any,
        denoisers: dict[str, nn.Module],
        prompts: Sequence[str] | None = None,
        call_kwargs: dict | None = None,
        seed: int = 0,
        progress: Callable = lambda items, **_: items,
    ) -> dict[str, CalibrationSet]:
        """Calls of each denoiser. ValueError for a bare module without an example. Prompts say nothing here."""
        if self.example is not None:
            seen = {name: as_calls([self.example]) for name in denoisers}
        elif isinstance(pipe, nn.Module):
            raise ValueError(f"{type(pipe).__name__} is no pipeline: show one of its calls, Synthetic(example={{...}})")
        else:
            seen = Recorder(samples=1, steps=1, texts=0).calls(pipe, denoisers, list(PROMPTS[:1]), call_kwargs, seed)
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, found in seen.items():
            calls = [
                self._draw(found.calls[0], sample, step, generator)
                for sample in range(self.samples)
                for step in range(self.steps)
            ]
            made[name] = CalibrationSet(tuple(calls), f"synthetic: {self.samples} draws of noise").hold_out(self.held)
        return made

    def _draw(self, seen: Call, sample: int, step: int, generator: torch.Generator) -> Call:
        place = (step + float(torch.rand((), generator=generator))) / self.steps  # 0 = the start of sampling
        unit = unit_of([seen.moment.t])
        t = None if seen.moment.t is None else unit * (1 - place)
        latents = next((x for _, x in seen.tensors() if x.is_floating_point() and x.ndim > 1), None)

        def fresh(x: Tensor) -> Tensor:
            if not x.is_floating_point() or x.ndim < 2:
                return x
            noise = torch.randn(x.shape, generator=generator)
            if x is latents:
                return noise.to(x.dtype)
            rows = x.float().flatten(0, -2)
            spread = rows.std(0, correction=0)
            return (rows.mean(0) + noise * spread).to(x.dtype)

        def told(key: str, value: Any) -> Any:
            if key in NAMES and isinstance(value, Tensor) and t is not None:
                return torch.full_like(value, t)
            return value if _maskish(key) else _map(value, fresh)

        args = tuple(
            torch.full_like(a, t)
            if t is not None and isinstance(a, Tensor) and _is_time(a, seen.moment)
            else _map(a, fresh)
            for a in seen.args
        )
        kwargs = {key: told(key, value) for key, value in seen.kwargs.items()}
        return Call(args, kwargs, replace(Moment(sample, step), t=t))


def _is_time(a: Tensor, moment: Moment) -> bool:
    """Whether a positional argument is the timestep that the call told."""
    return a.ndim < 2 and a.numel() > 0 and float(a.flatten()[0]) == moment.t
