"""`nvfp4`: e2m1 with an e4m3 scale per 16 and one float32 scale; the same numbers as qgen's nvfp4, other bytes.

    X.weight           (N, K / 2) uint8, HIGH nibble = even column
    X.weight_scale     (N, K / 16) float8_e4m3fn in the order of `comfy_blocked.py`
    X.weight_scale_2   () float32: w = code · (scale · scale_2)
    X.pre_quant_scale  (K,) that inputs are multiplied by, absent = 1: qgen's smoothing, inverted
    X.input_scale      () a fixed scale of activations, which qgen scales block by block: dropped

N and K are padded to 16 there. A file does not say by how much: rows beyond the bias are cut, columns are kept. Activations are float
unless the GPU multiplies NVFP4, which a file cannot ask for; they are float here. comfy-kitchen's codes in float32 are qgen's, bit for bit,
NaN aside; a weight of zeros has scale_2 = 0 there, whose scales are 0 / 0, and 1 here. Given bfloat16, its layout
finds scale_2 in bfloat16, which changes 2 % of a Gaussian's codes.
"""

__all__ = ["NVFP4", "NVFP4Native"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_blocked import blocked, blocked_shape, unblocked
from qgen.io.peers.comfy_found import FLOATS, SCALAR, Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike

WEIGHT = "nvfp4"
ACTS = ("", "nvfp4", "nvfp4_dynamic")


@dataclass(frozen=True)
class NVFP4Native:
    """e2m1 in blocks of 16."""

    name: str = "nvfp4"
    format: str = "nvfp4"
    about: str = "4-bit floats (e2m1), an e4m3 scale per 16 and one per weight"
    stock: bool = True

    def load(self, found: Found) -> list[Layer | Plain]:
        rows, half = found.shape("weight")
        if half % 8:
            raise found.bad("weight", "columns in whole blocks of 16 values")
        codes = found.read("weight", (torch.uint8,), ((rows, half),))
        scale = found.read("weight_scale", (torch.float8_e4m3fn,), (blocked_shape(rows, half // 8),))
        slots = {
            "codes": swap_nibbles(codes),
            "scales": unblocked(scale, rows, half // 8),
            "global_scale": found.read("weight_scale_2", (torch.float32,), SCALAR).reshape(()),
            "bias": None,
        }
        n = found.shape("bias", (1,))[0] if found.has("bias") else rows
        if -(-n // 16) * 16 != -(-rows // 16) * 16:
            raise found.bad("bias", f"{rows} values, or up to 15 fewer,")
        slots |= {"codes": slots["codes"][:n], "scales": slots["scales"][:n], "bias": found.bias(n)}
        before = found.maybe("pre_quant_scale", FLOATS, ((2 * half,),))
        if before is not None:
            if bool((before == 0).any()):
                raise found.bad("pre_quant_scale", "no zero")
            slots["smooth"] = 1 / before.float()
        note = found.drop("input_scale", "activations are scaled block by block")
        return [layer(found.path, WEIGHT, "", slots, 2 * half, found.compute, note=note)]

    def fits(self, n: int, k: int) -> str:
        return "" if n % 16 == k % 16 == 0 else f"N={n}, K={k} are no multiples of 16"

    def refusal(self, layer: Layer) -> str:
        why = unlike(layer, (WEIGHT,), ACTS, ("global_scale", "smooth"))
        if not why and layer.layout.hadamard:
            why = "it is rotated"
        if not why and layer.slots["global_scale"].numel() != 1:
            why = "its rows have scales of their own"
        return why or self.fits(*layer.shape)

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        slots = layer.slots
        stored = {
            "weight": swap_nibbles(slots["codes"]),
            "weight_scale": blocked(slots["scales"]),
            "weight_scale_2": slots["global_scale"].float().reshape(()),
        }
        if "smooth" in slots:
            stored["pre_quant_scale"] = 1 / slots["smooth"].float()
        return stored | ({"bias": slots["bias"]} if "bias" in slots else {}), {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        return rounded(path, formats.get(WEIGHT).quantize(weight), "", weight.shape[1], dtype)

    def refit(self, layer: Layer) -> Layer:
        return requantized(self, layer)


def swap_nibbles(codes: Tensor) -> Tensor:
    """Bytes with their two nibbles exchanged: the order of columns in a byte, either way."""
    return (codes << 4) | (codes >> 4)


NVFP4 = NVFP4Native()
