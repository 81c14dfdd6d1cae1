"""`float8_e4m3fn` and `float8_e5m2`: one float32 scale for the whole weight.

    X.weight        (N, K) float8
    X.weight_scale  () or (1,) float32; absent = 1; a file of one scale per row, (N, 1) or (N,), is read too
    X.input_scale   () float32: a fixed scale of the activations, which then are float8 as well

w = code · scale. comfy-kitchen rounds x · (1 / scale) where a division would be nearer; so does `quantize` here, for the same codes. Given
bfloat16 it rounds scale, reciprocal and product to bfloat16 first, which changes 4 % of a Gaussian's codes; here all is float32.
"""

__all__ = ["FP8", "FP8_E5M2", "Float8Native"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import SCALAR, Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike


@dataclass(frozen=True)
class Float8Native:
    """One of the two float8 grids."""

    name: str
    format: str
    element: str  # "e4m3" or "e5m2"
    dtype: torch.dtype
    stock: bool = True

    @property
    def about(self) -> str:
        return f"8-bit floats ({self.element}), one scale per weight"

    def load(self, found: Found) -> list[Layer | Plain]:
        shape = found.shape("weight", (2, 4))
        n, k = shape[0], torch.Size(shape[1:]).numel()
        codes = found.read("weight", (self.dtype,), (shape,)).view(torch.uint8).reshape(n, k)
        scale = found.maybe("weight_scale", (torch.float32,), (*SCALAR, (n, 1), (n,)))
        scale = torch.ones(()) if scale is None else scale
        per_row = scale.numel() > 1
        act_scale = found.maybe("input_scale", (torch.float32,), SCALAR) if self.element == "e4m3" else None
        note = found.drop("input_scale", "activations stay float") if act_scale is None else ""
        slots = {"codes": codes, "scales": scale.reshape(-1, 1).expand(n, 1), "bias": found.bias(n)}
        if act_scale is not None:
            slots["act_scale"] = act_scale.reshape(1)
        act = "" if act_scale is None else f"fp8_{self.element}_tensor"
        weight = f"fp8_{self.element}_{'row' if per_row else 'tensor'}"
        made = layer(found.path, weight, act, slots, k, found.compute, note=note)
        return [Layer(made.path, shape, made.layout, made.slots, made.dtype, note)]

    def fits(self, n: int, k: int) -> str:
        return ""

    def refusal(self, layer: Layer) -> str:
        family = f"fp8_{self.element}"
        static = ("act_scale",) if "act_scale" in layer.slots and layer.slots["act_scale"].numel() == 1 else ()
        acts = (f"{family}_tensor",) if static else ("", f"{family}_tensor", f"{family}_row")
        why = unlike(layer, (f"{family}_tensor", f"{family}_row"), acts, static)
        if not why and bool((layer.slots["scales"] != layer.slots["scales"][:1]).any()):
            why = "its rows have scales of their own"
        return why

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        slots = layer.slots
        stored = {"weight": slots["codes"].view(self.dtype), "weight_scale": slots["scales"][0, 0].float().clone()}
        if "act_scale" in slots:
            stored["input_scale"] = slots["act_scale"].float().reshape(())
        return stored | ({"bias": slots["bias"]} if "bias" in slots else {}), {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        q = formats.get(f"fp8_{self.element}_tensor").quantize(weight, reciprocal=True)
        return rounded(path, q, "", weight.shape[1], dtype)

    def refit(self, layer: Layer) -> Layer:
        return requantized(self, layer)


FP8 = Float8Native("fp8", "float8_e4m3fn", "e4m3", torch.float8_e4m3fn)
FP8_E5M2 = Float8Native("fp8_e5m2", "float8_e5m2", "e5m2", torch.float8_e5m2)
