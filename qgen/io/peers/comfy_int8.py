"""`int8_tensorwise`: int8 weights, one scale per weight or per row; activations are rounded to int8 too, one scale per token.

    X.weight        (N, K) int8
    X.weight_scale  () or (1,), or (N, 1) or (N,): float32
    mark            convrot: true and convrot_groupsize: the inputs are rotated first, see `comfy_rotation.py`

w = code · scale. In float32 comfy-kitchen's codes are those of int8_row. Where they differ: a weight in bfloat16 is divided in bfloat16
there, which changes 8 % of a Gaussian's codes and may emit -128; a row of zeros has the scale 1e-30 there and 0 here. Both stand for the
same zeros.
"""

__all__ = ["INT8", "INT8_CONVROT", "Int8Native"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.io.peers import comfy_rotation as rotation
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import SCALAR, Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike

WEIGHT = ACT = "int8_row"


@dataclass(frozen=True)
class Int8Native:
    """With or without the rotation."""

    name: str
    rotated: bool
    format: str = "int8_tensorwise"
    stock: bool = True

    @property
    def about(self) -> str:
        return f"8-bit integers, one scale per row{', rotated' if self.rotated else ''}; activations too"

    def load(self, found: Found) -> list[Layer | Plain]:
        n, k = found.shape("weight")
        codes = found.read("weight", (torch.int8,), ((n, k),)).view(torch.uint8)
        scale = found.read("weight_scale", (torch.float32,), (*SCALAR, (n, 1), (n,))).reshape(-1, 1).expand(n, 1)
        slots = {"codes": codes, "scales": scale, "bias": found.bias(n)}
        note = found.drop("input_scale", "activations are scaled token by token")
        if not found.option("convrot", False, (False, True)):
            return [layer(found.path, WEIGHT, ACT, slots, k, found.compute, note=note)]
        return rotation.load(found, WEIGHT, ACT, slots, k)

    def fits(self, n: int, k: int) -> str:
        return rotation.fits(k) if self.rotated else ""

    def refusal(self, layer: Layer) -> str:
        if self.rotated:
            return rotation.refusal(layer, WEIGHT, ACT)
        return unlike(layer, (WEIGHT,), (ACT,)) or ("it is rotated" if layer.layout.hadamard else "")

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        codes = rotation.codes_of(layer) if self.rotated else layer.slots["codes"]
        stored = {"weight": codes.view(torch.int8), "weight_scale": layer.slots["scales"].float()}
        stored |= {"bias": layer.slots["bias"]} if "bias" in layer.slots else {}
        return stored, {"convrot": True, "convrot_groupsize": layer.layout.hadamard} if self.rotated else {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        if self.rotated:
            return rotation.quantize(path, weight, WEIGHT, ACT, dtype)
        return rounded(path, formats.get(WEIGHT).quantize(weight), ACT, weight.shape[1], dtype)

    def refit(self, layer: Layer) -> Layer:
        if self.rotated or unlike(layer, (WEIGHT,), ("", ACT)) or layer.layout.hadamard:
            return requantized(self, layer)
        q = formats.QTensor(layer.slots["codes"], layer.slots["scales"], None, None, WEIGHT)
        return rounded(layer.path, q, ACT, layer.shape[1], layer.dtype, bias=layer.slots.get("bias"))


INT8 = Int8Native("int8", False)
INT8_CONVROT = Int8Native("int8_convrot", True)
