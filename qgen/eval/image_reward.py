"""ImageReward: BLIP with a head trained on 137,000 human comparisons of generated pictures.

The package `image-reward` holds the network; its weights are ImageReward.pt and med_config.json of the hub repository
THUDM/ImageReward, looked for in ~/.cache/ImageReward, and its tokenizer is bert-base-uncased in Hugging Face's cache.
qgen downloads none of them. Xu et al., 2023, https://arxiv.org/abs/2304.05977
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor

from qgen.eval.extractors import digest_of, extractors, load_tensors
from qgen.eval.preference import pil

__all__ = ["ImageReward"]


@extractors.register("image_reward")
class ImageReward:
    """A normalised reward per picture and prompt; people's average picture gets about 0."""

    name = "ImageReward v1.0"
    labels = {"image_reward": "ImageReward"}  # noqa: RUF012
    usual = True

    def __init__(self, path: str | None = None, device: str = "cpu"):
        package = importlib.import_module("ImageReward")
        weights = _weights_file(path)
        self.digest = digest_of(weights)
        load_tensors(weights)  # the package would unpickle the file: only one of plain tensors gets that far
        with contextlib.redirect_stdout(io.StringIO()):  # it prints while it loads
            self.model = package.load(str(weights), device=device, med_config=str(weights.with_name("med_config.json")))

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if the package can be imported and its files are there, else what to install and where to put them."""
        if importlib.util.find_spec("ImageReward") is None:
            return "install the package image-reward"
        try:
            importlib.import_module("ImageReward")
        except Exception as error:  # other people's import: it breaks in many ways when transformers moves on
            return f"the package image-reward is installed but does not import: {type(error).__name__}: {error}"
        weights = _weights_file(path)
        for file in (weights, weights.with_name("med_config.json")):
            if not file.is_file():
                return f"no {file}; it is {file.name} of the hub repository THUDM/ImageReward"
        return None

    @torch.inference_mode()
    def judge(self, picture: Tensor, prompt: str) -> float:
        """One picture (H, W, 3) in [0, 1] and its prompt to a reward."""
        return float(self.model.score(prompt, pil(picture)))


def _weights_file(path: str | None) -> Path:
    return Path(path) if path is not None else Path.home() / ".cache" / "ImageReward" / "ImageReward.pt"
