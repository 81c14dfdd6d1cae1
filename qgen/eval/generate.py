"""Draws one picture per prompt with noise that depends on the prompt alone.

Each prompt's seed is a hash of the prompt and the run's seed, and its noise is drawn on the CPU. Two pipelines, two
batch sizes or two computers therefore start a prompt from the same noise, and what differs between their pictures is
the model.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgen.eval.images import as_images
from qgen.progress import quiet

__all__ = ["generate", "seed_of"]


def seed_of(prompt: str, seed: int = 0) -> int:
    """A seed in [0, 2⁶³) that depends on both arguments alone."""
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Tensor:
    """Returns pictures (n, H, W, 3) on the CPU, float32 in [0, 1], or uint8 if `dtype` is torch.uint8.

    Arguments:
        pipe: a diffusers text-to-image pipeline. prompts: n strings; equal prompts give equal pictures. steps,
        guidance: passed as num_inference_steps and guidance_scale if given; else the pipeline's own defaults hold.
        options: further arguments of the pipeline's call, such as height.

    Raises ValueError for no prompts or for arguments that the pipeline does not take.
    """
    prompts = checked(prompts, batch_size)
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"dtype must be torch.float32 or torch.uint8, found {dtype}")
    asked = {"num_inference_steps": steps, "guidance_scale": guidance} | options
    asked = {name: value for name, value in asked.items() if value is not None}
    _check_call(pipe, asked)
    parts = []
    with quiet(pipe), progress_bar(len(prompts), progress) as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            noise = [torch.Generator("cpu").manual_seed(seed_of(prompt, seed)) for prompt in batch]
            result = pipe(prompt=batch, generator=noise, output_type="np", **asked)
            parts.append(_as(dtype, as_images(_images_of(result, pipe), "the pipeline's pictures")))
            bar.update(len(batch))
    return torch.cat(parts)


def checked(prompts: Sequence[str], batch_size: int) -> list[str]:
    """The prompts as a list of strings; ValueError for none, for one string, for other things, or a batch size below 1."""
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"a list of prompts wanted, found {str(prompts)[:80]!r}")
    if wrong := next((p for p in prompts if not isinstance(p, str)), None):
        raise ValueError(f"prompts are strings, found {type(wrong).__name__} among them")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    return list(prompts)


def _check_call(pipe: Any, asked: dict[str, Any]) -> None:
    if not callable(pipe):
        raise ValueError(f"a pipeline wanted, found {type(pipe).__name__}")
    taken = inspect.signature(pipe.__call__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    wrong = [name for name in ("prompt", "generator", "output_type", *asked) if name not in taken]
    if wrong:
        raise ValueError(f"{type(pipe).__name__} takes no argument {', '.join(wrong)}; it takes {', '.join(taken)}")


def _images_of(result: Any, pipe: Any) -> Any:
    images = getattr(result, "images", None)
    if images is None:
        raise ValueError(f"{type(pipe).__name__} returned {type(result).__name__} without images; scores need pictures")
    return images


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else x


def progress_bar(total: int, progress: bool) -> Any:
    """A bar that counts pictures, on stderr."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="drawing", unit="picture", disable=not progress)
