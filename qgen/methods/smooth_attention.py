r"""SmoothAttention: channels that stand out in keys are scaled down, and the queries' up, inside the weights that make them.

    (q λ) · (k / λ) = q · k,    λ_i = max(max|k_i|, max|k_i+D/2|)^α

Rotary positions turn channels i and i + D/2 into each other, so that both get one λ; for grouped queries, all queries of a key's head do.
It lets keys be rounded per token, as paged kernels do; keys rounded per channel do not need it. Lin et al., QServe, 2024,
https://arxiv.org/abs/2405.04532
"""

__all__ = ["smooth_attention"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.recorder import as_calls


def smooth_attention(model: nn.Module, calibration: Any, alpha: float = 0.5) -> nn.Module:
    """Folds λ into q_proj and k_proj of every attention of a decoder of transformers, in place, and returns it.

    calibration: calls, as for `qgen.quantize`. Keys are looked at before their positions turn them, which leaves a pair's length as it is.
    ValueError, before anything is changed, for attention with norms on queries and keys (they undo any scale), or with other layers.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smoothing of attention wants an exponent from 0 to 1, found {alpha}")
    owners = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    if not owners:
        raise ValueError(f"{type(model).__name__} has no attention with q_proj and k_proj to smooth")
    for owner in owners:
        if any(hasattr(owner, name) for name in ("q_norm", "k_norm")):
            raise ValueError(f"{type(owner).__name__} normalizes queries and keys, which undoes any scale")
        if type(owner.q_proj) is not nn.Linear or type(owner.k_proj) is not nn.Linear:
            raise ValueError(f"{type(owner).__name__} is quantized already: smooth it before")
    peaks = _peaks(model, owners, as_calls(calibration).calls)
    for owner, peak in zip(owners, peaks, strict=True):
        size = owner.head_dim
        pairs = peak.unflatten(0, (-1, 2, size // 2)).amax(1)  # (Hkv, D/2)
        scale = pairs.clamp_min(1e-5) ** alpha
        scale = (scale / scale.log().mean(-1, keepdim=True).exp()).clamp(1e-3, 1e3)
        keys = torch.cat([scale, scale], -1)  # (Hkv, D)
        queries = keys.repeat_interleave(owner.q_proj.out_features // owner.k_proj.out_features, 0)
        for layer, factor in ((owner.q_proj, queries.flatten()), (owner.k_proj, 1 / keys.flatten())):
            layer.weight.data = (layer.weight.detach() * factor[:, None]).to(layer.weight.dtype)
            if layer.bias is not None:
                layer.bias.data = (layer.bias.detach() * factor).to(layer.bias.dtype)
    return model


def _peaks(model: nn.Module, owners: Sequence[nn.Module], calls: Sequence[Any]) -> list[Tensor]:
    """Largest magnitude of each channel of each owner's keys, (Hkv · D,) float32; a pair's is its length, which positions keep."""
    found: dict[int, Tensor] = {}

    def watch(index: int):
        def hook(layer: nn.Module, args: tuple, out: Tensor) -> None:
            size = owners[index].head_dim
            a, b = out.detach().float().flatten(0, -2).unflatten(-1, (-1, 2, size // 2)).unbind(-2)
            length = (a.square() + b.square()).sqrt().amax(0)  # (Hkv, D/2)
            peak = torch.stack([length, length], 1).flatten()
            found[index] = peak if index not in found else torch.maximum(found[index], peak)

        return hook

    hooks = [owner.k_proj.register_forward_hook(watch(i)) for i, owner in enumerate(owners)]
    try:
        for call in calls:
            with torch.no_grad():
                call.run(model)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < len(owners):
        raise ValueError("a calibration call must reach every attention layer, and one was not reached")
    return [found[i] for i in range(len(owners))]
