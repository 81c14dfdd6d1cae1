"""Greedy agreement: what share of a continuation two models write alike before they part.

After the first token that differs both continue from different texts, and later equality is chance: only the common beginning counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qgen.eval.perplexity import _device
from qgen.nn.cache_name import cache_name, cache_of

__all__ = ["greedy", "match"]


@torch.inference_mode()
def greedy(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    """(new_tokens,) most likely tokens after ids (1, M), through the model's own cache; never stops early."""
    step, cache, found = ids.to(_device(model)), None, []
    name = cache_name(model)
    for _ in range(new_tokens):
        out = model(input_ids=step, use_cache=True, **{name: cache})
        cache = cache_of(out)
        step = out.logits[:, -1:].argmax(-1)
        found.append(step.flatten())
    return torch.cat(found).cpu()


def match(a: Tensor, b: Tensor) -> float:
    """Length of the common beginning of two token sequences (n,), over n, in [0, 1]."""
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"two sequences of equal length wanted, found {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a == b).long().cumprod(0).sum()) / len(a)
