r"""QuaRot: a rotation folded into a language model's weights. Its outputs stay what they were, its activations lose their outliers.

A decoder with RMSNorm does not see a rotation R of its residual stream, once the norms' gains γ have moved into the layers that read them:

    readers (q, k, v, gate, up, head):  W ← (W diag γ) R        writers (embedding, o, down):  W ← Rᵀ W,  b ← Rᵀ b
    per head, of v and o:               W_v ← H W_v,            W_o ← W_o Hᵀ

All of it in float64, cast once. What the down projection reads comes from a product of two layers and cannot be folded: put `Rotate` into
that layer's recipe. Ashkboos et al., 2024, https://arxiv.org/abs/2404.00456
"""

__all__ = ["fold_rotation"]

from typing import Any

import torch
from torch import Tensor, nn

from qgen.methods.hadamard import rotation

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def fold_rotation(model: nn.Module, seed: int = 0) -> nn.Module:
    """Rotates a causal language model of transformers in place, and returns it. Tied embeddings are untied.

    Serves decoders built as Llama's: RMSNorm with plain gains, q/k/v/o and gate/up/down (Llama, Mistral, Qwen2, Qwen3, SmolLM …).
    ValueError, before anything is changed, for any other.
    """
    inner = _inner(model)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embed.weight:
        head.weight = nn.Parameter(embed.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    r = rotation(embed.weight.shape[1], seed).to(embed.weight.device)
    _set(embed, embed.weight.detach().double() @ r)
    for index, layer in enumerate(inner.layers):
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, [getattr(attention, n) for n in _ATTENTION[:3]]),
            (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        ):
            _read(norm, readers, r)
        for writer in (attention.o_proj, mlp.down_proj):
            _set(writer, r.T @ writer.weight.detach().double())
            if writer.bias is not None:
                writer.bias.data = (r.T @ writer.bias.detach().double()).to(writer.bias.dtype)
        _heads(attention, seed + 1 + index)
    _read(inner.norm, [head], r)
    return model


def _read(norm: nn.Module, readers: list[nn.Module], r: Tensor) -> None:
    gain = norm.weight.detach().double()
    for layer in readers:
        _set(layer, (layer.weight.detach().double() * gain) @ r)
    norm.weight.data.fill_(1.0)


def _heads(attention: nn.Module, seed: int) -> None:
    """The values of every head in another basis, which the output projection undoes."""
    size = attention.head_dim
    h = rotation(size, seed).to(attention.v_proj.weight.device)
    v, o = attention.v_proj, attention.o_proj
    _set(v, (h.T @ v.weight.detach().double().unflatten(0, (-1, size))).flatten(0, 1))
    if v.bias is not None:
        v.bias.data = (v.bias.detach().double().unflatten(0, (-1, size)) @ h).flatten().to(v.bias.dtype)
    _set(o, (o.weight.detach().double().unflatten(1, (-1, size)) @ h).flatten(1))


def _set(layer: nn.Module, weight: Tensor) -> None:
    layer.weight.data = weight.to(layer.weight.dtype)


def _inner(model: Any) -> Any:
    """The decoder inside; ValueError naming what differs from Llama's."""
    kind = type(model).__name__
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if (
        not isinstance(layers, nn.ModuleList)
        or not hasattr(inner, "norm")
        or not hasattr(model, "get_output_embeddings")
    ):
        raise ValueError(
            f"{kind} is no decoder with model.layers, model.norm and a head: its rotation cannot be folded"
        )
    for index, layer in enumerate(layers):
        parts = [(getattr(layer, "self_attn", None), _ATTENTION), (getattr(layer, "mlp", None), _MLP)]
        for part, names in parts:
            for name in names:
                if type(getattr(part, name, None)) is not nn.Linear:
                    raise ValueError(
                        f"{kind}: model.layers.{index} has no linear layer {name!r}: its rotation cannot be folded"
                    )
        if any(hasattr(layer, n) for n in ("pre_feedforward_layernorm", "post_feedforward_layernorm")):
            raise ValueError(f"{kind}: model.layers.{index} has norms after its layers, which a rotation does not pass")
        for norm in (layer.input_layernorm, layer.post_attention_layernorm, inner.norm):
            _plain(norm, kind)
    return inner


def _plain(norm: nn.Module, kind: str) -> None:
    """ValueError unless `norm` computes x / rms(x) · γ."""
    with torch.no_grad():
        x = torch.linspace(-1, 2, norm.weight.numel(), dtype=norm.weight.dtype, device=norm.weight.device)[None]
        want = x.float() * x.float().square().mean().add(1e-6).rsqrt() * norm.weight.float()
        got = norm(x).float()
    if (
        not torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
        or getattr(norm, "bias", None) is not None
    ):
        raise ValueError(f"{kind}: {type(norm).__name__} is no RMSNorm with a plain gain: a rotation does not pass it")
