"""HPSv2: CLIP ViT-H/14 fine-tuned on 798,000 human choices between generated pictures; v2.1's weights.

    score = cosine of picture and prompt, as the package reports it (papers often show it times 100)

The package `hpsv2` holds the network; its weights are HPS_v2.1_compressed.pt of the hub repository xswu/HPSv2, in
Hugging Face's cache or given by path, and read as plain tensors. qgen downloads nothing.
Wu et al., 2023, https://arxiv.org/abs/2306.09341
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.eval.extractors import digest_of, extractors
from qgen.eval.preference import pil

__all__ = ["Hpsv2"]

REPOSITORY, FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


@extractors.register("hpsv2")
class Hpsv2:
    """A preference per picture and prompt, about 0.2 to 0.35."""

    name = "HPSv2.1"
    labels = {"hpsv2": "HPSv2.1"}  # noqa: RUF012
    usual = True

    def __init__(self, path: str | None = None, device: str = "cpu"):
        clip = importlib.import_module("hpsv2.src.open_clip")
        weights = _weights_file(path)
        self.digest, self.device = digest_of(weights), device
        # pretrained="" keeps the package from fetching LAION's weights, which the file below replaces anyway.
        self.model, _, self.prepare = clip.create_model_and_transforms(
            "ViT-H-14", "", precision="fp32", device=device, output_dict=True, light_augmentation=True, aug_cfg={}
        )
        self.model.load_state_dict(_state(weights))
        self.model.eval().requires_grad_(False)
        self.tokenize = clip.get_tokenizer("ViT-H-14")

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if the package can be imported and its weights are there, else what to install and where to put them."""
        if importlib.util.find_spec("hpsv2") is None:
            return "install the package hpsv2"
        try:
            importlib.import_module("hpsv2.src.open_clip")
        except Exception as error:  # other people's import: it may lack packages or files of its own
            return f"the package hpsv2 is installed but does not import: {type(error).__name__}: {error}"
        weights = _weights_file(path)
        if weights is None:
            command = f"`hf download {REPOSITORY} {FILE}`"
            return f"{FILE} is not in Hugging Face's cache; {command} puts it there, or name it as hpsv2:/path"
        return None if weights.is_file() else f"no weights at {weights}"

    @torch.inference_mode()
    def judge(self, picture: Tensor, prompt: str) -> float:
        """One picture (H, W, 3) in [0, 1] and its prompt to a cosine."""
        image = self.prepare(pil(picture)).unsqueeze(0).to(self.device)
        found = self.model(image, self.tokenize([prompt]).to(self.device))
        return float((found["image_features"] * found["text_features"]).sum())


def _state(weights: Path) -> Any:
    import pickle

    try:
        return torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadCheckpoint(f"{weights} holds no plain state_dict of tensors: {line}") from error


def _weights_file(path: str | None) -> Path | None:
    if path is not None:
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(REPOSITORY, FILE)
    return Path(found) if isinstance(found, str) else None
