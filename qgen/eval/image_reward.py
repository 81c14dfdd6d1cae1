"""ImageReward: BLIP with a head trained on 137,000 human comparisons of generated pictures.

The package `image-reward` holds the network; its weights are ImageReward.pt and med_config.json of the hub repository
THUDM/ImageReward, looked for in ~/.cache/ImageReward, and its tokenizer is bert-base-uncased in Hugging Face's cache.
qgen downloads none of them. Xu et al., 2023, https://arxiv.org/abs/2304.05977
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

import torch
from torch import Tensor

from qgen.eval.extractors import digest_of, extractors, load_tensors
from qgen.eval.preference import Judge, pil

__all__ = ["ImageReward"]


@extractors.register("image_reward")
class ImageReward(Judge):
    """A normalised reward per picture and prompt; people's average picture gets about 0."""

    name = "ImageReward v1.0"
    labels = {"image_reward": "ImageReward"}  # noqa: RUF012
    option, package, module = "image_reward", "image-reward", "ImageReward"
    repository, files = "THUDM/ImageReward", ("ImageReward.pt", "med_config.json")

    def __init__(self, path: str | None = None, device: str = "cpu"):
        package = importlib.import_module(self.module)
        weights = self.weights(path)
        self.digest = digest_of(weights)
        load_tensors(weights)  # the package would unpickle the file: only one of plain tensors gets that far
        with contextlib.redirect_stdout(io.StringIO()):  # it prints while it loads
            self.model = package.load(str(weights), device=device, med_config=str(weights.with_name(self.files[1])))

    @classmethod
    def usual_place(cls) -> Path:
        return Path.home() / ".cache" / "ImageReward" / cls.files[0]

    @torch.inference_mode()
    def judge(self, picture: Tensor, prompt: str) -> float:
        return float(self.model.score(prompt, pil(picture)))
