"""Learned human preference: one number per picture and prompt, by a network trained on people's choices.

Both networks are other people's packages with weights of their own; `qgen.eval.image_reward` and `qgen.eval.hpsv2` read
them where they are installed and say what is missing where not. Nothing small stands in for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["pil", "preference"]


def preference(pictures: Tensor, prompts: Sequence[str], judge: Any) -> Tensor:
    """Returns (n,) values of `judge.judge(picture (H, W, 3), prompt) -> float`; ValueError if the counts differ."""
    if len(pictures) != len(prompts):
        raise ValueError(f"one prompt per picture wanted, found {len(prompts)} prompts and {len(pictures)} pictures")
    return torch.tensor([judge.judge(x, prompt) for x, prompt in zip(pictures, prompts, strict=True)])


def pil(picture: Tensor) -> Any:
    """A PIL picture from (H, W, 3) in [0, 1], rounded to 8 bits."""
    from PIL import Image

    return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def _score(shots: Shots, metric: str) -> Measured:
    prompts, extractor = shots.need_prompts(metric), shots.extractor_for(metric)
    mine, theirs = shots.on_both(lambda pictures: preference(pictures, prompts, extractor))
    label = extractor.labels[metric]
    return Measured(label, "", "higher", per_prompt=mine, reference_per_prompt=theirs, extractor=extractor)


@metrics.register("image_reward")
@needs("prompts", "network")
def score_image_reward(shots: Shots) -> Measured:
    return _score(shots, "image_reward")


@metrics.register("hpsv2")
@needs("prompts", "network")
def score_hpsv2(shots: Shots) -> Measured:
    return _score(shots, "hpsv2")
