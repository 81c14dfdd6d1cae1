"""`awq_w4a16`: 4-bit weights with an offset per block of 64, 16-bit activations; for modulation layers, which see one row per sample.

    X.weight        (N, K / 2) int8, low nibble = even column, codes q = 0..15
    X.weight_scale  (K / 64, N) bf16 or fp16
    X.weight_zeros  the same shape and dtype; `weight_zero` in some files

w = (q - 8) · scale + zero, which is int4o_g64 with the signed code q - 8: kept bit for bit. comfy-kitchen computes w in the scales' dtype,
so that its bfloat16 weights are rounded twice; qgen's are computed in float32.
"""

__all__ = ["AWQ", "AWQNative"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike

OFFSET = {torch.bfloat16: "int4o_g64", torch.float16: "int4o_g64_f16"}
PLAIN = {torch.bfloat16: "int4_g64", torch.float16: "int4_g64_f16"}
_BLOCK = 64


@dataclass(frozen=True)
class AWQNative:
    """W4A16."""

    name: str = "awq_w4a16"
    format: str = "awq_w4a16"
    about: str = "4-bit integers with an offset per 64, for weights only"
    stock: bool = False

    def load(self, found: Found) -> list[Layer | Plain]:
        n, half = found.shape("weight")
        if half % (_BLOCK // 2):
            raise found.bad("weight", f"columns in whole blocks of {_BLOCK}")
        found.option("group_size", _BLOCK, (_BLOCK,))
        codes = found.read("weight", (torch.int8,), ((n, half),)).view(torch.uint8)
        groups = ((2 * half // _BLOCK, n),)
        scale = found.read("weight_scale", tuple(OFFSET), groups)
        zero = found.read("weight_zeros" if found.has("weight_zeros") else "weight_zero", (scale.dtype,), groups)
        slots = {"codes": codes ^ 0x88, "scales": scale.T, "zero": zero.T, "bias": found.bias(n)}
        return [layer(found.path, OFFSET[scale.dtype], "", slots, 2 * half, found.compute)]

    def fits(self, n: int, k: int) -> str:
        return "" if k % _BLOCK == 0 else f"K={k} is no multiple of {_BLOCK}"

    def refusal(self, layer: Layer) -> str:
        allowed = (OFFSET.get(layer.dtype, ""), PLAIN.get(layer.dtype, ""))
        return unlike(layer, allowed, ("",), ("zero",)) or ("it is rotated" if layer.layout.hadamard else "")

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        slots = layer.slots
        scale = slots["scales"].T.contiguous()
        zero = slots["zero"].T.contiguous() if "zero" in slots else torch.zeros_like(scale)
        stored = {"weight": (slots["codes"] ^ 0x88).view(torch.int8), "weight_scale": scale, "weight_zeros": zero}
        return stored | ({"bias": slots["bias"]} if "bias" in slots else {}), {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        return rounded(path, formats.get(OFFSET[dtype]).quantize(weight), "", weight.shape[1], dtype)

    def refit(self, layer: Layer) -> Layer:
        dtype = layer.dtype if layer.dtype in OFFSET else torch.bfloat16
        return requantized(self, layer, dtype)


AWQ = AWQNative()
