"""`qgen.evaluate`: draws with two pipelines from the same noise and scores what came out.

    before = qgen.eval.generate(pipe, prompts)          # quantizing changes the pipeline in place
    qgen.quantize(pipe)
    print(qgen.evaluate(pipe, reference=before, prompts=prompts).table())

PSNR, SSIM and LPIPS say how close each picture stays to the reference's; the Fréchet distance compares the two sets,
or the pictures with real ones; the CLIP score asks whether pictures still show what the prompts say. Each row names
the network behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.eval.collect import collect, measure
from qgen.eval.generate import generate
from qgen.eval.images import as_images
from qgen.eval.metrics import Shots, check_early, same_shape
from qgen.eval.metrics import metrics as registry
from qgen.eval.resume import generate_into
from qgen.eval.scores import Scores

__all__ = ["evaluate"]

METRICS = ("psnr", "ssim", "lpips", "fid", "clip")


def evaluate(
    pipe: Any,
    reference: Any = None,
    prompts: Sequence[str] | None = None,
    *,
    metrics: Sequence[str] = METRICS,
    extractor: Any = "auto",
    real: Any = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
    **options: Any,
) -> Scores:
    """Scores a pipeline's pictures, against a reference's where the metric compares.

    Arguments:
        pipe: a diffusers text-to-image pipeline, or pictures that it has drawn, (n, H, W, 3), or a folder of them.
        reference: the 16-bit pipeline or its pictures for the same prompts and seed. Needed by psnr, ssim, ms_ssim, sqnr,
            lpips, dists.
        prompts: one per picture. The demo pipeline has its own held-out prompts; any other pipeline needs them.
        metrics: names registered in `qgen.eval.metrics`: psnr, ssim, ms_ssim, sqnr, lpips, dists, fid, kid, is, clip,
            clip_iqa, image_reward, hpsv2.
        extractor: "auto" takes the usual networks (InceptionV3, AlexNet, CLIP) where their weights are on this computer and
            small ones otherwise; "real" or "small" insist; or a name, or "name:path", or a mapping from metric to one of
            these.
        real: a folder of real pictures, or a features file, for fid and kid; without it they compare with the
            reference's pictures.
        steps, guidance, options: arguments of both pipelines' calls; left out, the pipelines' own defaults hold.
        seed: chooses the noise, and the bootstrap's draws.
        resume: a folder that keeps finished pictures (8-bit PNG); a second run draws what is missing and ends with the same
            numbers. Under `accelerate launch` the processes share the drawing through it.

    Fewer than 2048 pictures flag fid, and kid over the same network is added before it.

    Returns `Scores`. Raises ValueError for what does not fit together, before anything is drawn where that can be
    known, and `MissingWeights` if a network that was asked for is not on this computer.
    """
    names = _known(metrics)
    if reference is pipe and callable(pipe):
        raise ValueError(
            "reference is the very pipeline that is scored, and quantizing changes a pipeline in place: draw the "
            "reference's pictures first with qgen.eval.generate and pass those, or load the pipeline twice"
        )
    drawn = {"pipe": not callable(pipe), "reference": reference is not None and not callable(reference)}
    prompts = _prompts(pipe, prompts, drawn["pipe"])
    blank = torch.zeros(0)  # stands for pictures to come
    check_early(names, Shots(blank, None if reference is None else blank, prompts, real, extractor))
    draw = {
        "steps": steps,
        "guidance": guidance,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    } | options

    def shoot(source: Any, what: str) -> Tensor:
        if drawn[what]:
            return as_images(source, f"the {what}'s pictures")
        return (
            generate(source, prompts, **draw)
            if resume is None
            else generate_into(Path(resume) / what, source, prompts, **draw)
        )

    pictures = shoot(pipe, "pipe")
    if prompts is not None and len(prompts) != len(pictures):
        raise ValueError(f"one prompt per picture wanted, found {len(prompts)} prompts and {len(pictures)} pictures")
    theirs = None if reference is None else shoot(reference, "reference")
    if theirs is not None:
        same_shape(pictures, theirs)
    real = real if real is None or isinstance(real, (str, Path)) else as_images(real, "real pictures")
    shots = Shots(pictures, theirs, prompts, real, extractor, batch_size, _device(pipe))
    settings = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size}
    return collect(measure(registry, names, shots), len(pictures), shots.prompts or (), settings, seed)


def _known(names: Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise ValueError(f"no metrics to compute; known: {', '.join(registry)}")
    for name in names:
        registry[name]  # an unknown name is an error here, with the nearest known one
    return names


def _prompts(pipe: Any, prompts: Sequence[str] | None, drawn: bool) -> list[str] | None:
    if prompts is not None:
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"a list of prompts wanted, found {prompts!r}")
        return list(prompts)
    if drawn:
        return None
    if type(pipe).__name__ == "EmojiPixArtPipeline":
        from qgen.demo import demo_prompts

        return demo_prompts("held_out")
    raise ValueError("prompts wanted: pass prompts=[...], at least a few dozen for an interval that says something")


def _device(pipe: Any) -> str:
    device = getattr(pipe, "device", None)
    return str(device) if isinstance(device, torch.device) and device.type == "cuda" else "cpu"
