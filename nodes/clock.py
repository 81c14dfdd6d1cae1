"""Where sampling is, as ComfyUI tells it: the noise levels in `transformer_options["sigmas"]`, as the timestep that the network is given.

    t = model_sampling.timestep(σ)

Other node packs may put their own numbers in the place of the network's argument (caches, per-frame schedules); σ is what the sampler is
at. Tables over timesteps are in units of the network's own argument, so that a file of them means the same in ComfyUI and in diffusers.
Calls without `sigmas` are read by their argument, as `qgen.nn.clock` does.
"""

__all__ = ["Sigmas", "timestep", "wind"]

import weakref
from typing import Any

from torch import Tensor, nn

from qgen.nn import clock


def timestep(model: Any, args: tuple, kwargs: dict) -> Tensor | None:
    """The timesteps (B,) float32 of a call of `model.diffusion_model`, None where it tells none.

    model: ComfyUI's, whose `model_sampling` knows how σ and timesteps belong together. B: of the input, in which ComfyUI lays the positive
    and the negative conditioning behind each other, with the same noise levels each.
    """
    sigmas = (kwargs.get("transformer_options") or {}).get("sigmas")
    if not isinstance(sigmas, Tensor) or not sigmas.numel():
        return clock.timestep_of(model.diffusion_model, args, kwargs)
    t = model.model_sampling.timestep(sigmas.flatten()).float()
    rows = len(args[0]) if args and isinstance(args[0], Tensor) else len(t)
    return t.repeat(rows // len(t)) if rows > len(t) and rows % len(t) == 0 else t


class Sigmas(clock.Clock):
    """The clock of a diffusion model of ComfyUI's."""

    def __init__(self, model: Any):
        super().__init__(model.diffusion_model)
        self.model = weakref.ref(model)  # which holds the module that holds this

    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        model = self.model()
        t = None if model is None else timestep(model, args, kwargs)
        super().listen(module, *((args, kwargs) if t is None else ((), {"timestep": t})))


def wind(model: Any) -> None:
    """Gives the timed layers of a model of ComfyUI's their clock. May be called any number of times."""
    module = model.diffusion_model
    if "qgen_clock" not in module.__dict__ and any(getattr(m, "t_edges", None) is not None for m in module.modules()):
        module.__dict__["qgen_clock"] = Sigmas(model)
    clock.wind(module)
