r"""`svdquant_w4a4`: 4-bit integers on both sides, smoothing, and a low-rank branch on the raw input.

    X.weight         (N, K / 2) int8, low nibble = even column, two's complement
    X.weight_scale   (K / 64, N) bf16 or fp16
    X.smooth_factor  (K,) that inputs are divided by     X.proj_down (K, R)     X.proj_up (N, R)     X.bias (N,)
    mark             act_unsigned: inputs after GELU, shifted by 0.171875 to be positive, in codes 0..15; the bias undoes the shift

or, instead of the first two and `proj_up`, tiles: (N / 128, K / 64, 32, 128), (N / 128, K / 64, 128) and (N / 128, R, 128).

y = Q((x + shift) / smooth) W₄ᵀ + (x down) upᵀ + bias: qgen's own formula, so all of it stays packed. comfy-kitchen divides by the
smoothing, in x's dtype, and keeps the activations' scales in it; qgen multiplies by the reciprocal in float32. Li et al., 2024,
https://arxiv.org/abs/2411.05007
"""

__all__ = ["SVDQUANT", "SVDQuantNative"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import FLOATS, Found
from qgen.io.peers.comfy_native import layer, requantized, rounded, unlike
from qgen.io.peers.floats import dequantized
from qgen.kernels import reference
from qgen.methods.lowrank import low_rank

WEIGHTS = {torch.bfloat16: "int4_g64", torch.float16: "int4_g64_f16"}
SIGNED, UNSIGNED, SHIFT = "int4_g64", "uint4p_g64", 0.171875
_RANK = 32  # of a weight that comes without a branch; files hold multiples of _UNIT
_UNIT = 16


@dataclass(frozen=True)
class SVDQuantNative:
    """W4A4 with a 16-bit branch."""

    name: str = "svdquant_w4a4"
    format: str = "svdquant_w4a4"
    about: str = "4-bit integers in blocks of 64 with a low-rank branch; activations too"
    stock: bool = False

    def load(self, found: Found) -> list[Layer | Plain]:
        shape = found.shape("weight", (2, 4))
        tiled = len(shape) == 4
        if tiled and shape[2:] != (32, 128):
            raise found.bad("weight", "tiles (N / 128, K / 64, 32, 128)")
        n, k = (shape[0] * 128, shape[1] * 64) if tiled else (shape[0], shape[1] * 2)
        if k % 64:
            raise found.bad("weight", "columns in whole blocks of 64")
        rank = found.shape("proj_down")[1]
        found.option("lowrank_branch_input_basis", "raw", ("raw",))
        unsigned = found.option("act_unsigned", False, (False, True))
        halves = tuple(WEIGHTS)
        codes = found.read("weight", (torch.int8,), (shape,)).view(torch.uint8)
        scale = found.read("weight_scale", halves, (((n // 128, k // 64, 128) if tiled else (k // 64, n)),))
        up = found.read("proj_up", FLOATS, (((n // 128, rank, 128) if tiled else (n, rank)),))
        smooth = found.read("smooth_factor", FLOATS, ((k,),))
        if bool((smooth == 0).any()):
            raise found.bad("smooth_factor", "no zero")
        slots = {
            "codes": codes.view(-1, k // 64, 32, 4, 32).permute(0, 2, 3, 1, 4).reshape(n, k // 2) if tiled else codes,
            "scales": scale.transpose(1, 2).reshape(n, k // 64) if tiled else scale.T,
            "smooth": None if bool((smooth == 1).all()) else smooth,
            "down": found.read("proj_down", FLOATS, ((k, rank),)).T,
            "up": up.transpose(1, 2).reshape(n, rank) if tiled else up,
            "bias": found.bias(n),
            "shift": torch.tensor(SHIFT, dtype=found.compute) if unsigned else None,
        }
        act = UNSIGNED if unsigned else SIGNED
        return [layer(found.path, WEIGHTS[scale.dtype], act, slots, k, found.compute)]

    def fits(self, n: int, k: int) -> str:
        return (
            "" if k % 64 == 0 and min(n, k) >= 64 else f"K={k} is no multiple of 64" if k % 64 else f"N={n} is below 64"
        )

    def refusal(self, layer: Layer) -> str:
        slots, unsigned = layer.slots, layer.layout.act == UNSIGNED
        allowed = ("smooth", "down", "up", *(("shift",) if unsigned else ()))
        why = unlike(layer, tuple(WEIGHTS.values()), (SIGNED, UNSIGNED), allowed)
        if why or layer.layout.hadamard:
            return why or "it is rotated"
        if unsigned and not ("shift" in slots and slots["shift"].numel() == 1 and float(slots["shift"]) == SHIFT):
            return f"its inputs are not shifted by {SHIFT}"
        if layer.dtype not in WEIGHTS:
            return "it computes in float32"
        odd = [
            name
            for name in ("scales", "smooth", "down", "up")
            if name in slots and not _holds(layer.dtype, slots[name])
        ]
        return f"its {odd[0]} has values that {str(layer.dtype)[6:]} lacks" if odd else ""

    def store(self, layer: Layer) -> tuple[dict[str, Tensor], dict]:
        (n, k), slots, dtype = layer.shape, layer.slots, layer.dtype
        rank = -(-layer.layout.rank // _UNIT) * _UNIT or _UNIT
        down, up = torch.zeros(k, rank, dtype=dtype), torch.zeros(n, rank, dtype=dtype)
        if "down" in slots:
            down[:, : layer.layout.rank], up[:, : layer.layout.rank] = slots["down"].T, slots["up"]
        smooth = slots["smooth"].to(dtype) if "smooth" in slots else torch.ones(k, dtype=dtype)
        stored = {"weight": slots["codes"].view(torch.int8), "weight_scale": slots["scales"].T.to(dtype).contiguous()}
        stored |= {"smooth_factor": smooth, "proj_down": down, "proj_up": up}
        stored |= {"bias": slots["bias"]} if "bias" in slots else {}
        return stored, {"act_unsigned": True} if layer.layout.act == UNSIGNED else {}

    def quantize(self, path: str, weight: Tensor, dtype: torch.dtype) -> Layer:
        up, down = (part.to(dtype) for part in low_rank(weight, min(_RANK, min(weight.shape) // 4)))
        q = formats.get(WEIGHTS[dtype]).quantize(weight - up.float() @ down.float())
        return rounded(path, q, SIGNED, weight.shape[1], dtype, down=down, up=up)

    def refit(self, layer: Layer) -> Layer:
        """Keeps smoothing and branch, and the codes if they are of this format. Inputs become signed, unless shifted as they are here."""
        dtype = layer.dtype if layer.dtype in WEIGHTS else torch.bfloat16
        slots, shift = layer.slots, layer.slots.get("shift")
        unsigned = layer.layout.act == UNSIGNED and shift is not None and shift.numel() == 1 and float(shift) == SHIFT
        if layer.layout.hadamard or ("down" not in slots and layer.layout.weight not in WEIGHTS.values()):
            return requantized(self, layer, dtype)
        kept = {name: slots[name].to(dtype) for name in ("smooth", "down", "up") if name in slots}
        kept |= {"shift": shift if unsigned else None, "bias": slots.get("bias") if unsigned else dequantized(layer)[1]}
        return rounded(
            layer.path, _residual(layer, dtype), UNSIGNED if unsigned else SIGNED, layer.shape[1], dtype, **kept
        )


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether the dtype has every value of the tensor."""
    return torch.equal(tensor.to(dtype).float(), tensor.float())


def _residual(layer: Layer, dtype: torch.dtype) -> QTensor:
    """What is quantized of a layer, in this format: its own codes if they are of it."""
    slots, name = layer.slots, WEIGHTS[dtype]
    if layer.layout.weight in WEIGHTS.values() and _holds(dtype, slots["scales"]):
        return QTensor(slots["codes"], slots["scales"].to(dtype), None, None, name)
    parts = (slots["codes"], slots["scales"], slots.get("global_scale"), slots.get("zero"))
    return formats.get(name).quantize(reference.weight(*parts, layer.layout.weight)[:, : layer.shape[1]])


SVDQUANT = SVDQuantNative()
