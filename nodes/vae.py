"""Quantize VAE: convolutions and attention of the decoder (or all of it) with 8-bit weights, activations float or 8-bit too.

A decoder works on large pictures with few weights, so this saves memory traffic on units with 8-bit arithmetic, not gigabytes: it is an
option, and off in every example. Convolutions over time (video) and the last convolution stay float.
"""

__all__ = ["quantize_vae"]

import copy
from typing import Any

import torch

from qgen.nodes import registry
from qgen.nodes.packed_copy import packed_copy
from qgen.nodes.registry import Input, Node, Output

WEIGHTS = {"int8": "int8_row", "fp8": "fp8_e4m3_row"}
PARTS = ("decoder", "encoder and decoder")
KEPT = ("*conv_out*", "*conv_in*", "*quant_conv*")  # few weights, and an error there is seen in every pixel


def quantize_vae(vae: Any, weights: str = "int8", activations: bool = False, part: str = PARTS[0]) -> tuple[Any]:
    """(a copy of `vae` whose layers are packed,). BadData for weights that hold NaN, and if a small picture of the copy does: decoders in
    float16 are known to overflow."""
    from qgen.errors import BadData
    from qgen.recipe import Recipe, Spec

    fmt = WEIGHTS[weights]
    recipe = Recipe(Spec(fmt, fmt if activations else None), name=f"vae {weights}").skip(
        *KEPT, why="kept float in decoders"
    )
    if part == PARTS[0]:
        recipe = recipe.skip("*encoder*", why="only the decoder was asked for")
    made = copy.copy(vae)
    made.patcher = packed_copy(vae.patcher, recipe)
    made.first_stage_model = made.patcher.model
    if not _finite(made):
        raise BadData(
            f"vae: the decoder with {weights} weights draws NaN; "
            + (
                "so does the one that came in: choose another VAE or precision"
                if not _finite(vae)
                else "leave it as it is"
            )
        )
    return (made,)


def _finite(vae: Any) -> bool:
    """Whether the picture of a small random latent is free of NaN; True for decoders whose latents are no pictures or videos."""
    sides = {2: (8, 8), 3: (1, 8, 8)}.get(getattr(vae, "latent_dim", 2))
    channels = getattr(vae, "latent_channels", None)
    if sides is None or channels is None:
        return True
    latent = torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0))
    return not bool(torch.isnan(vae.decode(latent)).any())


registry.register(
    Node(
        "QGenQuantizeVAE",
        "Quantize VAE (qgen)",
        "Packs the convolutions of a decoder into 8 bits. Optional: it saves little memory, and video decoders are left as they are.",
        run=quantize_vae,
        inputs=(
            Input("vae", "VAE", "The decoder; it is not changed."),
            Input("weights", "COMBO", "8-bit integers or 8-bit floats.", default="int8", choices=tuple(WEIGHTS)),
            Input("activations", "BOOLEAN", "Round activations to 8 bits too, for 8-bit arithmetic.", default=False),
            Input("part", "COMBO", "The decoder alone, or the encoder too.", default=PARTS[0], choices=PARTS),
        ),
        outputs=(Output("VAE", "vae", "The same decoder with packed weights."),),
        search=("decoder", "quantize", "8-bit", "int8", "fp8"),
        experimental=True,
    )
)
