"""Learned human preference: one number per picture and prompt, by a network trained on people's choices.

Both networks are other people's packages with weights of their own; `qgen.eval.image_reward` and `qgen.eval.hpsv2` read
them where they are installed and say what is missing where not. Nothing small stands in for them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["Judge", "pil", "preference"]


class Judge:
    """What both adapters share: a package of other people, its files in a usual place or at a given path, one score per picture.

    A child names the package on the index, the module to import, the hub repository of the files and their names; the first file holds
    the weights, the others lie beside it. It says in `usual_place` where they are usually, and scores in `judge`.
    """

    usual = True
    option: str  # its name in qgen
    package: str
    module: str
    repository: str
    files: tuple[str, ...]

    @classmethod
    def usual_place(cls) -> Path | None:
        """The weights, whether they are there or not; None where only the hub's cache could tell and it does not."""
        raise NotImplementedError

    @classmethod
    def weights(cls, path: str | None) -> Path | None:
        return Path(path) if path is not None else cls.usual_place()

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if the package imports and its files are there, else what to install, or where to get the files and to put them."""
        top = cls.module.partition(".")[0]
        if importlib.util.find_spec(top) is None:
            return f"install the package {cls.package}"
        try:
            importlib.import_module(cls.module)
        except Exception as error:  # other people's import: it breaks in many ways when its own dependencies move on
            return f"the package {cls.package} is installed but does not import: {type(error).__name__}: {error}"
        weights = cls.weights(path)
        get = f"`hf download {cls.repository} {' '.join(cls.files)}`"
        if weights is None:
            return (
                f"{cls.files[0]} is not in Hugging Face's cache; {get} puts it there, or name it as {cls.option}:/path"
            )
        for file in (weights, *(weights.with_name(name) for name in cls.files[1:])):
            if not file.is_file():
                return f"no {file}; {get} fetches it, and --local-dir {weights.parent} puts it there"
        return None

    def judge(self, picture: Tensor, prompt: str) -> float:
        """One picture (H, W, 3) in [0, 1] and its prompt to a score."""
        raise NotImplementedError


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
