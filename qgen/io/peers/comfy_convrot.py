"""`convrot_w4a4`: inputs rotated in groups of 256, then 4-bit integers on both sides, one scale per row and one per token.

    X.weight        (N, K / 2) int8, low nibble = even column, two's complement, -7..7
    X.weight_scale  (N,) or (N, 1) float32
    mark            convrot_groupsize (256), linear_dtype "int4" or "int8": a hint which units multiply, of the same numbers

In float32 comfy-kitchen's codes are those of int4_row after the same rotation; a row below 1e-10 has the scale 1e-10 / 7 there and its own
here. Activations are rotated and divided in the model's dtype there, in float32 here. ConvRot, https://arxiv.org/abs/2512.03673
"""

__all__ = ["CONVROT", "ConvRotNative"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.io.peers import comfy_rotation as rotation
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_native import requantized

WEIGHT = ACT = "int4_row"
_BLOCK = 64  # what the kernels of int4 multiply at a time


@dataclass(frozen=True)
class ConvRotNative:
    """Rotated W4A4."""

    name: str = "convrot_w4a4"
    format: str = "convrot_w4a4"
    about: str = "4-bit integers, one scale per row, rotated in groups of 256; activations too"
    stock: bool = True

    def load(self, found: Found) -> list[Layer | Plain]:
        n, half = found.shape("weight")
        codes = found.read("weight", (torch.int8,), ((n, half),)).view(torch.uint8)
        scale = found.read("weight_scale", (torch.float32,), ((n,), (n, 1))).reshape(n, 1)
        found.option("quant_group_size", _BLOCK, (_BLOCK,))
        found.option("linear_dtype", "int4", ("int4", "int8"))
        return rotation.load(found, WEIGHT, ACT, {"codes": codes, "scales": scale, "bias": found.bias(n)}, 2 * half)

    def fits(self, n: int, k: int) -> str:
        return rotation.fits(k)

    def refusal(self, layer: Layer) -> str:
        return rotation.refusal(layer, WEIGHT, ACT)

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        stored = {
            "weight": rotation.codes_of(layer).view(torch.int8),
            "weight_scale": layer.slots["scales"].reshape(-1),
        }
        stored |= {"bias": layer.slots["bias"]} if "bias" in layer.slots else {}
        return stored, {"convrot_groupsize": layer.layout.hadamard, "linear_dtype": "int4"}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        return rotation.quantize(path, weight, WEIGHT, ACT, dtype)

    def refit(self, layer: Layer) -> Layer:
        return requantized(self, layer)


CONVROT = ConvRotNative()
