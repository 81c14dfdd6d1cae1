"""Quantize CLIP: text encoders with 4- or 8-bit weights and float activations, rounded to nearest, without calibration.

A text encoder runs once per prompt and is bound by the bytes of its weights, so activations stay float. Embedding tables, norms and
the final projections stay as they are.
"""

__all__ = ["quantize_clip"]

from typing import Any

import torch

from qgen.nodes import registry
from qgen.nodes.packed_copy import packed_copy
from qgen.nodes.registry import Input, Node, Output

BITS = {
    "4-bit integers, groups of 64": "uint4_g64",
    "4-bit floats (NVFP4)": "nvfp4",
    "8-bit integers": "int8_row",
    "8-bit floats": "fp8_e4m3_row",
}
KEPT = ("*embed*", "*text_projection*", "*lm_head*", "*logit_scale*")


def quantize_clip(clip: Any, weights: str = "4-bit integers, groups of 64", keep_float: str = "") -> tuple[Any]:
    """(a clone of `clip` whose linear layers are packed,). keep_float: globs of layers to leave, separated by commas or spaces."""
    from qgen.recipe import Recipe, Spec

    globs = [part for part in keep_float.replace(",", " ").split() if part]
    recipe = Recipe(Spec(BITS[weights]), name="text encoder").skip(*KEPT, *globs, why="kept float in text encoders")
    made = clip.clone()
    made.patcher = packed_copy(clip.patcher, recipe, compute_dtype(clip))
    made.cond_stage_model = made.patcher.model
    return (made,)


def compute_dtype(clip: Any) -> torch.dtype:
    """float32, in which ComfyUI runs text encoders, for T5 overflows float16; on a GPU bfloat16, which has the same range."""
    return torch.bfloat16 if torch.device(clip.patcher.load_device).type == "cuda" else torch.float32


registry.register(
    Node(
        "QGenQuantizeCLIP",
        "Quantize CLIP (qgen)",
        "Packs the weights of text encoders into 4 or 8 bits; needs no calibration. LoRA loaders work before and after it.",
        run=quantize_clip,
        inputs=(
            Input("clip", "CLIP", "The text encoder, or several in one; it is not changed."),
            Input(
                "weights",
                "COMBO",
                "What becomes of the weights; activations stay as they are.",
                default="4-bit integers, groups of 64",
                choices=tuple(BITS),
            ),
            Input(
                "keep_float",
                "STRING",
                "Names of layers to leave alone, with * and ?, separated by commas: *.layers.0.* or *wo*.",
                default="",
                advanced=True,
            ),
        ),
        outputs=(Output("CLIP", "clip", "The same encoder with packed weights."),),
        search=("text encoder", "t5", "quantize", "4-bit", "8-bit", "weight-only"),
    )
)
