r"""One quantized linear of a Nunchaku file in natural order, and as qgen's slots: codes and scales bit for bit.

    W4A4:   y = Q(x / smooth) · (codes · scales · wtscale · wcscales)ᵀ + (x · down) · upᵀ + bias
    W4A16:  y = x · (codes · wscales + wzeros)ᵀ + bias

These are the reference kernel's formula with the formats int4_g64, nvfp4 (nvfp4_row where channels have scales of their own) and uint4_g64.
The input of an INT4 layer after GELU is shifted by 0.171875 and rounded to 0..15: the format uint4p_g64 and the slot `shift`. The bias of
the file holds the constant that undoes it, as qgen's does. wtscale · wcscales is one float32 per row; a product of 16-bit floats is exact.
"""

__all__ = ["FORMATS", "SHIFT", "Linear", "floats_of"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qgen import formats
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.floats import dequantized
from qgen.nn.packed import Layout

SHIFT = 0.171875  # 11 / 64: GELU is never below -0.17

FORMATS = {"int4": "int4_g64", "nvfp4": "nvfp4_row", "awq": "uint4_g64"}  # those that any layer of the kind has


@dataclass(frozen=True)
class Linear:
    """A layer in natural order, on its way from a file to a `Layer`. n, k: of the weight; the file's, padded, until cut.

    kind: "int4", "nvfp4" or "awq". channel: (N, 1) float32 of nvfp4, or None. act: name of the activations' format, "" = not rounded.
    """

    kind: str
    n: int
    k: int
    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    act: str = ""
    channel: Tensor | None = None
    zero: Tensor | None = None
    smooth: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    note: str = ""

    @property
    def block(self) -> int:
        return 16 if self.kind == "nvfp4" else 64

    def rows(self, start: int, stop: int) -> "Linear":
        """The layer of some of the outputs. What belongs to the input is shared."""
        names = ("codes", "scales", "channel", "zero", "up", "bias")
        cut = {name: t[start:stop].clone() for name in names if (t := getattr(self, name)) is not None}
        return replace(self, n=stop - start, **cut)

    def reordered(self, order: Tensor) -> "Linear":
        """The layer with its outputs in another order."""
        names = ("codes", "scales", "channel", "zero", "up", "bias")
        return replace(self, **{name: t[order] for name in names if (t := getattr(self, name)) is not None})

    def with_bias(self, bias: Tensor | None) -> "Linear":
        """The layer with another bias."""
        return replace(self, bias=bias)

    def columns(self, k: int) -> "Linear":
        """The layer without the padding of its inputs; what is left of it fills the last block."""
        kp = -(-k // self.block) * self.block
        inputs = {name: t[..., :k].clone() for name in ("smooth", "down") if (t := getattr(self, name)) is not None}
        groups = {
            name: t[:, : kp // self.block].clone()
            for name in ("scales", "zero")
            if (t := getattr(self, name)) is not None
        }
        return replace(self, k=k, codes=self.codes[:, : kp // 2].clone(), **inputs, **groups)

    def parts(self, path: str) -> list[Layer | Plain]:
        """Itself as a Layer called `path`, or as float tensors where no format of qgen stores scales of the file's dtype."""
        name = self._format()
        if name:
            return [self.layer(path, name)]
        why = f"no 4-bit integer format has scales in {str(self.scales.dtype)[6:]}"
        return floats_of(self.layer(path, FORMATS[self.kind]), why)

    def layer(self, path: str, weight: str) -> Layer:
        """Itself as a Layer of the format `weight`. Smoothing by 1 and a low rank of 0 are left out."""
        flat = self.smooth is None or bool((self.smooth == 1).all())
        slots = {
            "codes": self.codes,
            "scales": self.scales,
            "global_scale": self.channel,
            "zero": self.zero,
            "smooth": None if flat else self.smooth,
            "down": self.down if self._has_lowrank() else None,
            "up": self.up if self._has_lowrank() else None,
            "bias": self.bias,
            "shift": self.shift,
        }
        slots = {slot: t.contiguous() for slot, t in slots.items() if t is not None}
        if weight == "nvfp4":
            slots["global_scale"] = self.channel[0, 0].clone()
        rank = slots["down"].shape[0] if "down" in slots else 0
        layout = Layout(weight, self.act, rank, 0, tuple(s for s in slots if s not in ("codes", "scales")))
        return Layer(path, (self.n, self.k), layout, slots, self.dtype, self.note)

    def _has_lowrank(self) -> bool:
        return self.up is not None and bool(self.up.any()) and bool(self.down.any())

    def _format(self) -> str | None:
        """The format that stores codes and scales as they are."""
        if self.kind == "nvfp4":
            return "nvfp4" if bool((self.channel == self.channel[0]).all()) else "nvfp4_row"
        name = FORMATS[self.kind] + {torch.bfloat16: "", torch.float16: "_f16"}[self.scales.dtype]
        return name if name in formats.formats else None


def floats_of(layer: Layer, why: str) -> list[Plain]:
    """The float weight, and bias, that a layer stands for."""
    weight, bias = dequantized(layer)
    made = [Plain(f"{layer.path}.weight", weight.to(layer.dtype), f"dequantized: {why}")]
    return made if bias is None else [*made, Plain(f"{layer.path}.bias", bias.to(layer.dtype), made[0].note)]
