"""Pictures of a pair from the same noise, at 16 and at 4 bits, what lies between them, and how long each took.

    PSNR = 10 log10(255² / mean (after − before)²)          of the 8-bit pictures that are shown; infinite where they are equal

A hook on the denoiser counts its calls, which gives progress with any pipeline, and stops the pipeline when its job is cancelled.
"""

__all__ = ["draw", "draw_seeds", "psnr"]

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qgen.eval.images import as_images
from qgen.show.pictures import difference, enlarge, pixels
from qgen.web.jobs import Job
from qgen.web.models import Pair

MAX_SEED = 2**31 - 1
LEAST = 512  # pixels of width that a shown picture has at least; small ones are enlarged without smoothing


def draw(pair: Pair, job: Job) -> None:
    """One prompt, one seed: pictures in the job's folder, facts in its result."""
    before, after = (_draw(pair, job, which, job.asked["seed"]) for which in ("before", "after"))
    gain = job.asked["gain"]
    for name, picture in (
        ("16-bit", before[0]),
        ("4-bit", after[0]),
        ("difference", difference(before[0], after[0], gain)),
    ):
        save(picture, job.folder / f"{name}.png")
    job.result = {
        "psnr": _finite(psnr(before[0], after[0])),
        "seconds16": before[1],
        "seconds4": after[1],
        "peak16": before[2],
        "peak4": after[2],
        "bytes16": pair.totals["bytes16"],
        "bytes4": pair.totals["nbytes"],
        "kernels": list(pair.kernels),
        "size": list(before[0].shape[1::-1]),
    }


def draw_seeds(pair: Pair, job: Job) -> None:
    """One prompt, several seeds: per seed one picture that holds 16 bits, 4 bits and the difference, side by side."""
    first, count = job.asked["seed"], job.asked["count"]
    seeds = [(first + i) % (MAX_SEED + 1) for i in range(count)]
    made: list[dict] = []
    for number, seed in enumerate(seeds):
        before, after = (
            _draw(pair, job, which, seed, f"seed {number + 1} of {count}: ")[0] for which in ("before", "after")
        )
        gap = np.full((before.shape[0], max(1, before.shape[1] // 32), 3), 255, np.uint8)
        save(np.hstack([before, gap, after, gap, difference(before, after)]), job.folder / f"seed-{seed}.png", 3 * 192)
        made.append({"seed": seed, "psnr": _finite(psnr(before, after)), "file": f"seed-{seed}.png"})
        job.show(made=list(made))
    job.result = {"made": made}


def psnr(before: np.ndarray, after: np.ndarray) -> float:
    """Decibels between two uint8 pictures of one size."""
    error = float(np.mean((before.astype(np.float64) - after.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def save(picture: np.ndarray, path: Path, least: int = LEAST) -> None:
    from PIL import Image

    Image.fromarray(enlarge(picture, least)).save(path)


def _draw(pair: Pair, job: Job, which: str, seed: int, before: str = "") -> tuple[np.ndarray, float, int | None]:
    """The picture, seconds, and on a GPU the most bytes that were allocated while drawing."""
    import torch

    pipe = getattr(pair, which)
    steps = job.asked["steps"]
    words = f"{before}{'16' if which == 'before' else '4'} bits"
    modules = [getattr(pipe, name) for name in pair.denoisers]
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with _counted(modules, lambda n: job.step(f"{words}, step {min(n, steps)} of {steps}", min(n, steps), steps)):
        start = time.perf_counter()
        with torch.no_grad():
            found = pipe(**_options(pipe, job.asked), generator=torch.Generator("cpu").manual_seed(seed))
        seconds = time.perf_counter() - start
    images = getattr(found, "images", None)
    if images is None or len(images) == 0:
        raise ValueError(f"{type(pipe).__name__} draws no still picture, so there is nothing to lay side by side")
    picture = as_images(images[:1], f"the pictures at {'16' if which == 'before' else '4'} bits")[0]
    return pixels(picture), seconds, torch.cuda.max_memory_allocated() if gpu else None


@contextlib.contextmanager
def _counted(modules: list, heard: Callable[[int], None]) -> Iterator[None]:
    calls = 0

    def hook(*_: Any) -> None:
        nonlocal calls
        calls += 1
        heard(calls)

    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _options(pipe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call, those that it has."""
    known = inspect.signature(type(pipe).__call__).parameters
    options = {
        "prompt": asked["prompt"],
        "num_inference_steps": asked["steps"],
        "guidance_scale": asked["guidance"],
        "output_type": "np",  # a picture of whole numbers would hide NaN as black
    }
    for side in ("width", "height"):
        if asked.get(side):
            options[side] = asked[side]
    return {name: value for name, value in options.items() if name in known}


def _finite(x: float) -> float | None:
    """None for infinity, which JSON has no number for: the pictures are equal."""
    return x if math.isfinite(x) else None
