"""`mxfp8`: e4m3 with a power of two per 32.

    X.weight        (N, K) float8_e4m3fn
    X.weight_scale  (N, K / 32) float8_e8m0fnu, or uint8 of the same bits, in the order of `comfy_blocked.py`; 2^(scale - 127)

The scale is the least power of two that lets the block's largest value fit under 448. comfy-kitchen finds it by a float32 logarithm, which
rounds: up to some float32 steps above 448 · 2^e it takes e, and clips to 448, where the exact answer, taken here, is e + 1. A scale of 0 is
zero there, not 2^-127, and a block that small is divided by it, so that its zeros turn into NaN. Here `quantize` rounds such blocks to 0,
and files with a scale of 0 are read with the codes 0.
"""

__all__ = ["MXFP8", "MXFP8Native"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_blocked import blocked, blocked_shape, unblocked
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike

WEIGHT, ROUNDED = "mxfp8_e4m3", "mxfp8_e4m3_rceil"  # decode alike; the second chooses its exponents as described above
WEIGHTS = tuple(WEIGHT + mode for mode in ("", "_rceil", "_even", "_best"))


@dataclass(frozen=True)
class MXFP8Native:
    """e4m3 in blocks of 32."""

    name: str = "mxfp8"
    format: str = "mxfp8"
    about: str = "8-bit floats (e4m3), a power of two per 32"
    stock: bool = True

    def load(self, found: Found) -> list[Layer | Plain]:
        rows, k = found.shape("weight")
        if k % 32:
            raise found.bad("weight", "columns in whole blocks of 32")
        codes = found.read("weight", (torch.float8_e4m3fn,), ((rows, k),)).view(torch.uint8)
        stored = found.read("weight_scale", (torch.float8_e8m0fnu, torch.uint8), (blocked_shape(rows, k // 32),))
        scales = unblocked(stored.view(torch.uint8), rows, k // 32)
        if bool((scales == 255).any()):
            raise found.bad("weight_scale", "no NaN (255)")
        n = found.shape("bias", (1,))[0] if found.has("bias") else rows
        if -(-n // 32) * 32 != -(-rows // 32) * 32:
            raise found.bad("bias", f"{rows} values, or up to 31 fewer,")
        codes = codes.unflatten(1, (-1, 32)).masked_fill((scales == 0)[..., None], 0).flatten(1)
        note = found.drop("input_scale", "activations are scaled block by block")
        slots = {"codes": codes[:n], "scales": scales[:n], "bias": found.bias(n)}
        return [layer(found.path, WEIGHT, "", slots, k, found.compute, note=note)]

    def fits(self, n: int, k: int) -> str:
        return "" if n % 32 == k % 32 == 0 else f"N={n}, K={k} are no multiples of 32"

    def refusal(self, layer: Layer) -> str:
        why = unlike(layer, WEIGHTS, ("", *WEIGHTS)) or ("it is rotated" if layer.layout.hadamard else "")
        if not why and bool((layer.slots["codes"].unflatten(1, (-1, 32))[layer.slots["scales"] == 0] & 127).any()):
            why = "it has blocks of scale 2^-127, which ComfyUI reads as zero"
        return why or self.fits(*layer.shape)

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        slots = layer.slots
        scale = blocked(slots["scales"]).view(torch.float8_e8m0fnu)
        stored = {"weight": slots["codes"].view(torch.float8_e4m3fn), "weight_scale": scale}
        return stored | ({"bias": slots["bias"]} if "bias" in slots else {}), {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        fmt = formats.get(ROUNDED)
        scales, _, _ = fmt.ranges(weight)
        kept = fmt.blocks(weight).masked_fill((scales == 0)[..., None], 0).flatten(1)
        q = fmt.quantize(kept, like=QTensor(kept, scales, None, None, ROUNDED))
        return rounded(path, replace(q, format=WEIGHT), "", weight.shape[1], dtype)

    def refit(self, layer: Layer) -> Layer:
        return requantized(self, layer)


MXFP8 = MXFP8Native()
