"""Calibration with the user's own sampler: what the diffusion model is called with while ComfyUI draws.

The model samples from the user's conditioning and latent with the user's settings, once per seed; a hook keeps every call of the
diffusion model. Its place in sampling (timestep, step, seed) is the call's Moment, so later stages may treat steps differently.
"""

__all__ = ["Settings", "record"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment
from qgen.nodes.clock import timestep

_DROPPED = ("wrappers", "callbacks")  # of transformer_options: a replay is not part of any sampling
_NEVER = ("patches", "patches_replace")  # functions of others; they stay as they are


@dataclass(frozen=True)
class Settings:
    """What ComfyUI's KSampler takes, and how many seeds are drawn."""

    seed: int = 0
    steps: int = 20
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    runs: int = 1


def record(patcher: Any, positive: Any, negative: Any, latent: dict, settings: Settings, bar: Any) -> CalibrationSet:
    """The calls, their tensors on the CPU. `bar.update()` is called for each. The patcher is left as it was."""
    import comfy.sample

    patcher = patcher.clone()
    start = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"])
    calls: list[Call] = []
    tape: dict[tuple, Tensor] = {}
    run = step = 0

    def keep(t: Tensor) -> Tensor:
        """One copy of what several calls share, such as the text."""
        key = (t.data_ptr(), t._version if not t.is_inference() else -1, tuple(t.shape), t.stride(), t.dtype)
        known = tape.get(key)
        if known is not None and torch.equal(known, t.detach().cpu()):
            return known
        tape[key] = t.detach().to("cpu", copy=True)
        return tape[key]

    def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal step
        bar.update()
        t = timestep(patcher.model, args, kwargs)
        moment = Moment(run, step, None if t is None else float(t[0]))
        calls.append(Call(_kept(args, keep), _kept(kwargs, keep), moment))
        step += 1

    hook = patcher.model.diffusion_model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        for run in range(settings.runs):
            step = 0
            seed = settings.seed + run
            comfy.sample.sample(
                patcher,
                comfy.sample.prepare_noise(start, seed, latent.get("batch_index")),
                settings.steps,
                settings.cfg,
                settings.sampler,
                settings.scheduler,
                positive,
                negative,
                start,
                denoise=settings.denoise,
                noise_mask=latent.get("noise_mask"),
                disable_pbar=True,
                seed=seed,
            )
    finally:
        hook.remove()
    return CalibrationSet(tuple(calls), f"ComfyUI: {settings}").hold_out()


def _kept(value: Any, keep: Any) -> Any:
    """`value` with its tensors on the CPU and without what would make a replay part of a sampling."""
    if isinstance(value, Tensor):
        return keep(value)
    if type(value) in (tuple, list):
        return type(value)(_kept(v, keep) for v in value)
    if isinstance(value, dict):
        return {k: v if k in _NEVER else _kept(v, keep) for k, v in value.items() if k not in _DROPPED}
    return value
