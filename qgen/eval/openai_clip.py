"""CLIP: picture and text towers trained on 400 M pairs, the network behind the numbers that papers call CLIPScore.

Read through transformers from a folder (`"clip:/path/to/folder"`) or from Hugging Face's cache, and never downloaded
by qgen. Radford et al., 2021, https://arxiv.org/abs/2103.00020
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qgen.eval.extractors import digest_of, extractors

__all__ = ["Clip"]

MODEL = "openai/clip-vit-large-patch14"  # torchmetrics' default as well


@extractors.register("clip")
class Clip:
    """Embeddings (B, K) of pictures and of prompts."""

    labels = {"clip": "CLIPScore", "clip_iqa": "CLIP-IQA"}  # noqa: RUF012
    usual = True

    def __init__(self, path: str | None = None, device: str = "cpu"):
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        folder = _folder(path)
        self.device = device
        self.name = f"CLIP ({MODEL})" if path is None else f"CLIP ({Path(path).name})"
        self.digest = digest_of(*sorted(folder.glob("*.safetensors")))
        self.network = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.network.float().eval().requires_grad_(False).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    @classmethod
    def missing(cls, path: str | None = None) -> str | None:
        """None if transformers and a folder with safetensors are there, else what to do."""
        if importlib.util.find_spec("transformers") is None:
            return "install the package transformers"
        folder = _folder(path)
        if folder is None:
            command = f"`hf download {MODEL}`"
            return f"{MODEL} is not in Hugging Face's cache; {command} puts it there, or name a folder as clip:/path"
        return None if any(folder.glob("*.safetensors")) else f"no *.safetensors in {folder}"

    @torch.inference_mode()
    def embed_images(self, pictures: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] to (B, K)."""
        x = [(picture * 255).round().to(torch.uint8).numpy() for picture in pictures]
        pixels = self.processor(images=x, return_tensors="pt")["pixel_values"].to(self.device)
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        return self.network.visual_projection(pooled)

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """B prompts to (B, K); CLIP reads 77 tokens of each."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        pooled = self.network.text_model(**tokens.to(self.device)).pooler_output
        return self.network.text_projection(pooled)


def _folder(path: str | None) -> Path | None:
    if path is not None:
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(MODEL, "model.safetensors")
    return Path(found).parent if isinstance(found, str) else None
