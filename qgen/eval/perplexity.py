r"""Perplexity: how many next tokens the model wavers between, on average.

    perplexity = exp( mean over tokens of -log p(token | the tokens before it) )

The first token of a window has nothing before it and is not predicted. Windows do not overlap, so values are a little
higher than with a sliding window; compare equal windows only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["nll_per_token", "perplexity"]


@torch.inference_mode()
def nll_per_token(model: Any, ids: Tensor) -> Tensor:
    """-log p of tokens 2 … M, (M - 1,) float32 on the CPU, for ids (1, M)."""
    logits = model(input_ids=ids.to(_device(model))).logits[0, :-1].float()  # (M - 1, vocabulary)
    picked = logits.log_softmax(-1).gather(1, ids[0, 1:].to(logits.device).unsqueeze(1))
    return -picked.squeeze(1).cpu()


def perplexity(model: Any, windows: list[Tensor]) -> float:
    """Over all predicted tokens of windows, each (1, M >= 2)."""
    return float(torch.cat([nll_per_token(model, ids) for ids in windows]).double().mean().exp())


def _device(model: Any) -> torch.device:
    return next(model.parameters(), next(model.buffers(), torch.zeros(0))).device
