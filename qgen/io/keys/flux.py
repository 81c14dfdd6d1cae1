"""FLUX.1: original (and ComfyUI) names to diffusers', and back, for a transformer of any width.

    double_blocks.0.img_attn.qkv      (3h, h)       → to_q, to_k, to_v
    single_blocks.0.linear1           (3h + m, h)   → to_q, to_k, to_v, proj_mlp
    final_layer.adaLN_modulation.1    shift, scale  → norm_out.linear: scale, shift

Both layouts were read off their models' own modules: https://github.com/black-forest-labs/flux and diffusers' FluxTransformer2DModel.
"""

__all__ = ["config", "convert", "place"]

import re

import torch
from torch import Tensor

from qgen.io.keys.families import conversions
from qgen.io.keys.outward import Place, outward

_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


@conversions.register("FluxTransformer2DModel")
def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by original name to tensors by diffusers' name. KeyError for a name that the family lacks."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        leaf = "weight" if leaf == "scale" else leaf
        block = _BLOCK.fullmatch(module)
        if block is None:
            if module == "final_layer.adaLN_modulation.1":
                tensor = torch.cat(tensor.chunk(2)[::-1])
            made[f"{_OUTER[module]}.{leaf}"] = tensor
            continue
        kind, number, inner = block.groups()
        prefix = f"{'' if kind == 'double' else 'single_'}transformer_blocks.{number}."
        if inner in _FUSED:
            width = tensors[
                f"{kind}_blocks.{number}.{'linear2' if inner == 'linear1' else inner[:3] + '_attn.proj'}.weight"
            ].shape[0]
            parts = _FUSED[inner]
            for part, piece in zip(
                parts, tensor.split([width] * 3 + [tensor.shape[0] - 3 * width] * (len(parts) - 3)), strict=True
            ):
                made[f"{prefix}{part}.{leaf}"] = piece
        else:
            made[prefix + (_DOUBLE if kind == "double" else _SINGLE)[inner] + "." + leaf] = tensor
    return made


_OURS = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_BACK = {
    kind: {ours: (theirs, None) for theirs, ours in table.items()}
    | {ours: (theirs, (i, len(_FUSED[theirs]))) for theirs in fused for i, ours in enumerate(_FUSED[theirs])}
    for kind, table, fused in (("double", _DOUBLE, ("img_attn.qkv", "txt_attn.qkv")), ("single", _SINGLE, ("linear1",)))
}


@outward.register("FluxTransformer2DModel")
def place(path: str) -> Place:
    """Where a module of diffusers' model is in the original layout; KeyError for one that the family lacks."""
    block = _OURS.fullmatch(path)
    if block is None:
        theirs = next((name for name, ours in _OUTER.items() if ours == path), None)
        if theirs is None:
            raise KeyError(path)
        return Place(theirs, swapped=theirs == "final_layer.adaLN_modulation.1")
    kind = "single" if block[1] else "double"
    theirs, order = _BACK[kind][block[3]]
    return Place(f"{kind}_blocks.{block[2]}.{theirs}", order, leaf="scale" if theirs.endswith("_norm") else "weight")


def config(shapes: dict[str, tuple[int, ...]]) -> dict | None:
    """diffusers' config of a transformer with these tensors (original names), None where heads are not 128 wide: shapes do not tell
    the axes of the rotary embedding then."""
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    if head != 128:
        return None
    blocks = {(m[1], int(m[2])) for m in map(_BLOCK.fullmatch, shapes) if m}
    inside, outside = shapes["img_in.weight"][1], shapes["final_layer.linear.weight"][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": inside,
        "out_channels": None if inside == outside else outside,
        "num_layers": sum(kind == "double" for kind, _ in blocks),
        "num_single_layers": sum(kind == "single" for kind, _ in blocks),
        "attention_head_dim": head,
        "num_attention_heads": shapes["img_in.weight"][0] // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, 56, 56],
    }
