"""Leads the libraries' attention to torch's `scaled_dot_product_attention`, per model: there `nn.attention` catches it.

diffusers: processors that ask a dispatcher get the native backend for themselves, whatever backend is active elsewhere; processors that
call torch directly need nothing. transformers: a model that uses torch's attention gets the function "qgen", which does not repeat keys
and values for grouped queries; what it does not mean (caps, sinks, position biases) goes to the library's own function.
"""

__all__ = ["give_back", "use_torch"]

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NAME = "qgen"


def use_torch(module: nn.Module, owners: Iterable[nn.Module] = ()) -> dict[str, Any]:
    """Prepares a model and changes nothing outside it; returns what `give_back` wants.

    owners: modules whose processors may ask diffusers' dispatcher.
    """
    before: dict[str, Any] = {"processors": [], "implementation": ""}
    for owner in owners:
        processor = getattr(owner, "processor", None)
        if hasattr(processor, "_attention_backend"):
            from diffusers.models.attention_dispatch import AttentionBackendName

            before["processors"].append((processor, processor._attention_backend))
            processor._attention_backend = AttentionBackendName.NATIVE
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__}
    if ("transformers", "PreTrainedModel") in names and module.config._attn_implementation == "sdpa":
        _register()
        before["implementation"] = "sdpa"
        module.set_attn_implementation(NAME)
    return before


def give_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Undoes `use_torch`."""
    for processor, backend in reversed(before["processors"]):
        processor._attention_backend = backend
    if before["implementation"]:
        module.set_attn_implementation(before["implementation"])


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes. q (B, H, Lq, D); k, v (B, Hkv, Lk, D); returns (B, Lq, H, D)."""
    special = ("softcap", "s_aux", "position_bias", "output_attentions")
    uneven = attention_mask is None and query.shape[2] != key.shape[2]  # prefill into a cache of fixed size
    if query.shape[2] < 2 or uneven or any(kwargs.get(name) is not None for name in special):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal and attention_mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None
