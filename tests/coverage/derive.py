"""A tiny model of any class, and a call it answers, from the class's own signature: widths shrink by the names of the parameters.

`config(kind)` gives constructor arguments, `inputs(kind, config)` the tensors that `forward` asks for, both by rules on names that the
libraries use consistently. What a class ties together in a way that no name tells (rope axes that must add up to a head) stands in
`denoisers.py`. Random weights are kept as the class makes them, except that constant ones get noise: with zeros in every gate (adaLN-Zero,
control branches) nothing that a block computes would reach the output.
"""

__all__ = ["config", "inputs", "randomize", "signature", "unfilled_is_nan"]

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, TEXT = 16, 6  # image tokens and text tokens of a call
WIDTH, HEADS, SMALL = 64, 2, 32  # hidden width = 2 heads of 32; width of text and time embeddings

_AXES = {2: (16, 16), 3: (8, 12, 12), 4: (8, 8, 8, 8)}  # rope axes add up to a head

# Constructor parameters by name: the first rule that matches the whole name wins. A callable gets the default.
RULES: tuple[tuple[str, Any], ...] = (
    (r"num_single_layers|num_single_dit_layers|num_text_blocks|n(um)?_refiner_layers", 1),
    (r"(transformer_)?num_(hidden_|visual_|mmdit_|text_)?(layers|blocks)|n_?layers|(dit_)?depth|mmdit_layers", 2),
    (r"(\w+_)?num_(attention_|key_value_|kv_|key_value_attention_)?heads|n_(kv_)?heads|nheads|num_heads|dit_heads", HEADS),
    (r"(\w+_)?attention_head_dim|head_dim|d_kv|linear_head_dim", 32),
    (r"hidden_size|dim|model_dim|d_model|embed_dim|dit_dim|token_dim", WIDTH),
    (r"(\w+_)?(ffn_dim|intermediate_size|ff_dim|d_ff|ffn_hidden_size|intermediate_dim|ff_inner_dim)", 128),
    (r"(\w+_)?cross_attention_dim(_t5)?", lambda old: old and WIDTH),
    (r"(in|out|latent|audio_in|audio_out|io)_channels?|in_visual_dim|out_visual_dim|latent_dim", lambda old: old and 4),
    (r"joint_attention_dim|text_embed_dim|(dit_)?text_dim|caption_channels|cap_feat_dim|context_in_dim|text_in_dim|in_text_dim", SMALL),
    (r"pooled_projection_dim|in_text_dim2|text_emb_dim|text_hidden_dim|cond_token_dim|global_cond_dim|condition_dim", SMALL),
    (r"caption_projection_dim", WIDTH),
    (r"freq_dim|time_embed_dim|time_dim|adaln_lora_dim|adaln_dim|timestep_embed_dim|time_step_dim|time_proj_dim", SMALL),
    (r"(timestep|fourier|timestep_guidance)_(channels|embedding_dim|features_dim)", SMALL),
    (r"(rope_)?axes_dims?(_rope)?|rope_dim(_list)?", lambda old: old and _AXES[len(old)]),
    (r"axes_lens", lambda old: type(old)(64 for _ in old)),
    (r"rope_max_seq_len|pos_embed_max_size", 32),
    (r"sample_size|sample_height|sample_width", 8),
    (r"norm_num_groups|groups", 8),
    (r"block_out_channels", (32, WIDTH)),
    (r"layers_per_block", 1),
    (r"down_block_types", lambda old: (old[-1], old[0])),
    (r"up_block_types", lambda old: (old[-1], old[0])),
    (r"conditioning_embedding_out_channels", (8, 16)),
    (r"vocab_size|num_embeds_ada_norm", lambda old: old and 96),
)  # fmt: skip


def signature(method: Any) -> dict[str, Any]:
    """Parameter names of a method and their defaults (`inspect._empty` where there is none)."""
    found = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in found if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def config(kind: type, **given: Any) -> dict[str, Any]:
    """Constructor arguments of a tiny `kind`; `given` wins over the rules, and `...` leaves a parameter at its default."""
    made = {}
    for name, default in signature(kind.__init__).items():
        rule = next((value for pattern, value in RULES if re.fullmatch(pattern, name)), None)
        if rule is not None:
            default = None if default is inspect.Parameter.empty else default
            made[name] = rule(default) if callable(rule) else rule
    return {name: value for name, value in {**made, **given}.items() if value is not ...}


def inputs(kind: type, config: dict[str, Any], randn: Callable[..., Tensor]) -> dict[str, Any]:
    """Keyword arguments of `kind.forward` by the names of its parameters; one sample."""
    c = {**{n: d for n, d in signature(kind.__init__).items() if d is not inspect.Parameter.empty}, **config}
    asked = signature(kind.forward)
    text = next((c[n] for n in _TEXT_WIDTHS if isinstance(c.get(n), int)), SMALL)
    axes = next((len(c[n]) for n in ("axes_dims_rope", "axes_dims", "rope_axes_dim") if c.get(n)), 3)
    channels = next((c[n] for n in ("in_channels", "in_visual_dim", "io_channels") if c.get(n)), 4)
    known = {
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, TEXT, text),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "encoder_hidden_states_mask": torch.ones(1, TEXT),
        "pooled_projections": randn(1, c["pooled_projection_dim"]) if c.get("pooled_projection_dim") else None,
        "guidance": torch.tensor([4.0]) if c.get("guidance_embeds") else None,
        "img_ids": torch.zeros(TOKENS, axes),
        "txt_ids": torch.zeros(TEXT, axes),
        "sample": randn(1, channels, 8, 8),
        "controlnet_cond": randn(1, 3, 16, 16),
    }
    if "img_ids" in asked:
        known["hidden_states"] = randn(1, TOKENS, channels)
    elif "3D" in kind.__name__:
        known["hidden_states"] = randn(1, channels, 2, 8, 8)
    else:
        known["hidden_states"] = randn(1, channels, 8, 8)
    return {name: value for name, value in known.items() if name in asked and value is not None}


_TEXT_WIDTHS = (
    "encoder_hid_dim", "joint_attention_dim", "text_embed_dim", "caption_channels", "text_dim", "cap_feat_dim", "context_in_dim",
    "text_in_dim", "in_text_dim", "cross_attention_dim", "hidden_size",
)  # fmt: skip


@contextlib.contextmanager
def unfilled_is_nan():
    """Within the block memory that a class leaves as it comes (experts of NucleusMoE) is NaN, which `randomize` replaces: else what lay
    there before would be the weights, other ones in every process."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Noise for every parameter that is constant or not finite, in place: gates near 1, biases near 0, matrices like a linear layer's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if not p.numel() or not p.is_floating_point():
                continue
            flat = p.detach().flatten()
            if bool(torch.isfinite(flat).all()) and not bool((flat == flat[0]).all()) and float(flat.abs().max()) < 1e4:
                continue
            one = bool((flat == 1).all())
            fan = p.shape[1:].numel() if p.ndim > 1 else 100
            if p.ndim == 3 and min(p.shape[1:]) >= SMALL:  # matrices of experts, not a convolution's kernels
                fan = p.shape[1]
            p.copy_(float(one) + torch.randn(p.shape, generator=generator) * min(1.0, fan**-0.5))
    return module.eval().requires_grad_(False)
