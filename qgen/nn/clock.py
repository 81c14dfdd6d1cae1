r"""Clock: where sampling is, read off the denoiser's own timestep, and what timed layers make of it. Attention reads the same clock.

    y = s_b · op((x + c_b) / s_b) + d_b,     b = the bin of the sample's timestep

c (T, K) is added to the input, s (T,) is the step of static activation scales, d (T, N) the bias: exact for any kernel, as all of `op` but
the rounding is linear. The tables have one row per bin and a last one for "no timestep"; where they follow few curves they are kept as
t_mix (T, R) times R rows, of which t_shift has the last ones alone (`qgen.timed`). A bin is found by comparing the timestep, per sample,
with the layer's edges: never by counting calls, so that another scheduler, fewer steps, or samples at different timesteps in one batch are
right; timesteps beyond those that were calibrated belong to the first or last bin. All of it is index_select and arithmetic on tensors: one
compiled graph for all steps.
Ranges per timestep: TFMQ-DM, Huang et al., 2023, https://arxiv.org/abs/2311.16503.
"""

__all__ = ["NAMES", "TIMED", "Clock", "apply", "argument_of", "clock_of", "stop", "timestep_of", "whole_table", "wind"]

import bisect
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("qgen")

NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas")  # what denoisers call it
TIMED = ("t_edges", "t_mix", "t_shift", "t_scale", "t_bias")  # slots of a layer, beside those of its op


class Clock:
    """The timesteps of a denoiser's current call, one float32 for each sample, or None where the call gave none.

    `listen` is a forward pre-hook of the denoiser; its layers hold the clock and read `t`. Where attention chooses by timestep, `edges` are
    those of its ranges (ascending; range i holds edges[i - 1] < t <= edges[i]), and `where`, a tensor () int64, is the range of the first
    sample: one number, read once per call, since on a GPU each reading waits for all that was launched. 0 without a timestep.
    """

    def __init__(self, module: nn.Module):
        self.t: Tensor | None = None
        self.edges: tuple[float, ...] = ()
        self.where = torch.tensor(0)
        self.places = _places(module)
        self.told = False
        self.hook = module.register_forward_pre_hook(self.listen, with_kwargs=True)

    def listen(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.t = _per_sample(_find(self.places, args, kwargs))
        if self.edges:
            self.where = self._range()

    def _range(self) -> Tensor:
        if self.t is None:
            self.tell("attention uses what its lowest timesteps use")
            return torch.tensor(0)
        if torch.compiler.is_compiling():  # inside a graph nothing may depend on a value
            return torch.bucketize(self.t[0], torch.tensor(self.edges, device=self.t.device))
        return torch.tensor(bisect.bisect_left(self.edges, float(self.t[0])))

    def tell(self, consequence: str) -> None:
        """Warns, once, that the denoiser was called without a timestep."""
        if not self.told and not torch.compiler.is_compiling():
            self.told = True
            log.warning("the denoiser was called without a timestep: %s", consequence)


def argument_of(module: nn.Module) -> str:
    """Name of the argument that a denoiser's clock reads first; "" if none of `NAMES` is among its arguments."""
    return next((name for _, name in _places(module)), "")


def timestep_of(module: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """The timesteps (B,) float32 that a call gives a denoiser by one of `NAMES`, or None.

    Where tokens of a sample differ in their timestep, the sample has the noisiest one.
    """
    return _per_sample(_find(_places(module), args, kwargs))


def _places(module: nn.Module) -> list[tuple[int, str]]:
    """Positions and names of the arguments that may hold a denoiser's timestep."""
    return [(i, n) for i, n in enumerate(inspect.signature(module.forward).parameters) if n in NAMES]


def _find(places: list[tuple[int, str]], args: tuple, kwargs: dict) -> Any:
    for index, name in places:
        value = kwargs.get(name, args[index] if index < len(args) else None)
        if isinstance(value, (Tensor, int, float)):
            return value
    return next((kwargs[n] for n in NAMES if isinstance(kwargs.get(n), Tensor)), None)


def _per_sample(value: Any) -> Tensor | None:
    if value is None or (isinstance(value, Tensor) and not value.numel()):
        return None
    t = torch.as_tensor(value).float().contiguous()  # a batch that shares one timestep is often an expanded view
    return t.reshape(1) if t.ndim == 0 else t if t.ndim == 1 else t.flatten(1).amax(1)


def apply(layer: Any, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run(x)` of a packed layer with its timed tables around it; x (B, …, K), or (B, C, H, W) for a 2-D convolution."""
    images = isinstance(layer, nn.Conv2d)  # other convolutions come here as patches
    bins = _bins(layer, x)

    def rows(table: Tensor | None, like: Tensor) -> Tensor | None:
        if table is None:
            return None
        found = _rows(layer, table, bins).reshape(len(bins), -1)  # (B, K), (B, N) or (B, 1)
        if len(bins) not in (1, len(like)):
            found = found.repeat_interleave(len(like) // len(bins), 0)
        return (
            found[(..., *[None] * (like.ndim - 2))]
            if images
            else found.reshape(len(found), *[1] * (like.ndim - 2), found.shape[1])
        )

    shift, scale = rows(layer.t_shift, x), rows(layer.t_scale, x)
    if shift is not None:
        x = (x + shift).to(x.dtype)  # one rounding, not the shift's as well
    if scale is None:
        y = run(x)
    else:
        scale = scale.to(x.dtype)
        y = run(x / scale) * scale
    bias = rows(layer.t_bias, y)
    return y if bias is None else y + bias.to(y.dtype)


def _rows(layer: Any, table: Tensor, bins: Tensor) -> Tensor:
    """A table's rows for bins (B,)."""
    if layer.t_mix is None or table is layer.t_scale:
        return table.index_select(0, bins)
    with torch.autocast(table.device.type, enabled=False):
        return layer.t_mix.index_select(0, bins)[:, -len(table) :] @ table.float()


def whole_table(layer: Any, name: str) -> Tensor:
    """A table of a layer by its name among `TIMED`, with a row for each bin and one for "no timestep", float32."""
    table = getattr(layer, name).float()
    return table if layer.t_mix is None or name == "t_scale" else layer.t_mix[:, -len(table) :] @ table


def _bins(layer: Any, x: Tensor) -> Tensor:
    """Rows of the layer's tables for the samples of x: (B,), or (1,) where one serves all."""
    clock = layer.clock
    if layer.t_edges is None or clock is None or clock.t is None:
        if layer.t_edges is not None and clock is not None:
            clock.tell("its layers use what fits all timesteps alike")
        last = 0 if layer.t_edges is None else len(layer.t_edges) + 1
        return torch.full((1,), last, dtype=torch.int64, device=x.device)
    t = clock.t.to(x.device)
    if len(t) > 1 and len(x) % len(t):
        raise RuntimeError(
            f"a layer's input has {len(x)} rows along its first axis, the denoiser got {len(t)} timesteps: the first must be a multiple"
        )
    return torch.bucketize(t, layer.t_edges)


def clock_of(module: nn.Module) -> Clock:
    """The denoiser's clock; its first use puts one on."""
    if "qgen_clock" not in module.__dict__:
        module.__dict__["qgen_clock"] = Clock(module)
    return module.__dict__["qgen_clock"]


def wind(module: nn.Module) -> None:
    """Gives timed layers of a denoiser that have none its clock. May be called any number of times."""
    for layer in module.modules():
        if getattr(layer, "t_edges", None) is not None and layer is not module:
            layer.__dict__["clock"] = clock_of(module)


def stop(module: nn.Module) -> None:
    """Takes the clock off a denoiser that has no timed layer any more, nor attention that chooses by timestep."""
    clock = module.__dict__.get("qgen_clock")
    if clock is None or clock.edges or any(getattr(layer, "t_edges", None) is not None for layer in module.modules()):
        return
    del module.__dict__["qgen_clock"]
    clock.hook.remove()
