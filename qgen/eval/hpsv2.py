"""HPSv2: CLIP ViT-H/14 fine-tuned on 798,000 human choices between generated pictures; v2.1's weights.

    score = cosine of picture and prompt, as the package reports it (papers often show it times 100)

The package `hpsv2` holds the network; its weights are HPS_v2.1_compressed.pt of the hub repository xswu/HPSv2, in
Hugging Face's cache or given by path, and read as plain tensors. qgen downloads nothing.
Wu et al., 2023, https://arxiv.org/abs/2306.09341
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.eval.extractors import digest_of, extractors
from qgen.eval.preference import Judge, pil

__all__ = ["Hpsv2"]


@extractors.register("hpsv2")
class Hpsv2(Judge):
    """A preference per picture and prompt, about 0.2 to 0.35."""

    name = "HPSv2.1"
    labels = {"hpsv2": "HPSv2.1"}  # noqa: RUF012
    option, package, module = "hpsv2", "hpsv2", "hpsv2.src.open_clip"
    repository, files = "xswu/HPSv2", ("HPS_v2.1_compressed.pt",)

    def __init__(self, path: str | None = None, device: str = "cpu"):
        clip = importlib.import_module(self.module)
        weights = self.weights(path)
        self.digest, self.device = digest_of(weights), device
        # pretrained="" keeps the package from fetching LAION's weights, which the file below replaces anyway.
        self.model, _, self.prepare = clip.create_model_and_transforms(
            "ViT-H-14", "", precision="fp32", device=device, output_dict=True, light_augmentation=True, aug_cfg={}
        )
        self.model.load_state_dict(_state(weights))
        self.model.eval().requires_grad_(False)
        self.tokenize = clip.get_tokenizer("ViT-H-14")

    @classmethod
    def usual_place(cls) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(cls.repository, cls.files[0])
        return Path(found) if isinstance(found, str) else None

    @torch.inference_mode()
    def judge(self, picture: Tensor, prompt: str) -> float:
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
