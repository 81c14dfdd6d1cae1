r"""ConvRot's rotation, the regular Hadamard matrix, as qgen's Sylvester one: the same layer, without a new kernel.

ConvRot multiplies each group of g = 4^m inputs by R = r ⊗ … ⊗ r / √g, where r is all ones but for -1 on its antidiagonal. For indices of
base-4 digits i = (i₁ i₀), r[i, j] = (-1)^((i₀ + j₀)(i₁ + j₁)), and the exponent opens to i₀i₁ + j₀j₁ + (i₀j₁ + i₁j₀). So

    R = D P H D      D = diag(±1), -1 where an odd number of digits is 3;  P swaps the two bits of every digit;  H Sylvester's matrix

and x R = ((x D) H) P D. The inputs' signs D are a smoothing of ±1. P and D behind H are undone in the codes of the weight: columns change
places and sign, which changes no scale of a whole row. Activations, one scale per token, round the same. Only a code -2^(b-1), which
ComfyUI's own rounding does not emit at 4 bits, has no negative; such a layer is read as floats.
"""

__all__ = ["GROUPS", "codes_of", "fits", "load", "quantize", "refusal", "rotate", "signs", "swapped"]

from functools import lru_cache

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.comfy_found import Found
from qgen.io.peers.comfy_native import layer, unlike

GROUPS = (256, 64)  # that `quantize` chooses from: the largest that divides K
_READABLE = (4, 16, 64, 256, 1024, 4096)


@lru_cache(maxsize=16)
def signs(size: int) -> Tensor:
    """D (size,) float32: -1 where an odd number of base-4 digits is 3."""
    i, odd = torch.arange(size), torch.zeros(size, dtype=torch.bool)
    for shift in range(0, size.bit_length() - 1, 2):
        odd ^= (i >> shift) & 3 == 3
    return torch.where(odd, -1.0, 1.0)


@lru_cache(maxsize=16)
def swapped(size: int) -> Tensor:
    """P (size,): each index with the two bits of every base-4 digit swapped; its own inverse."""
    i, found = torch.arange(size), torch.zeros(size, dtype=torch.long)
    for shift in range(0, size.bit_length() - 1, 2):
        digit = (i >> shift) & 3
        found |= ((digit >> 1) | ((digit & 1) << 1)) << shift
    return found


@lru_cache(maxsize=16)
def matrix(size: int) -> Tensor:
    """R (size, size) float32: symmetric and orthogonal."""
    digit = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    r = torch.ones(1, 1)
    while r.shape[0] < size:
        r = torch.kron(r, digit)
    return r / size**0.5


def rotate(weight: Tensor, size: int) -> Tensor:
    """weight (N, K) times R in groups of `size` columns, in its own dtype."""
    return (weight.unflatten(-1, (-1, size)) @ matrix(size).to(weight.dtype)).flatten(-2)


def fits(k: int) -> str:
    return "" if any(k % size == 0 for size in GROUPS) else f"K={k} is no multiple of {GROUPS[-1]}"


def quantize(path: str, weight: Tensor, format: str, act: str, dtype: torch.dtype) -> Layer:
    """Rotates a float32 weight (N, K) and rounds its rows."""
    size = next(size for size in GROUPS if weight.shape[1] % size == 0)
    q = formats.get(format).quantize(rotate(weight, size))
    return _made(path, format, act, {"codes": q.codes, "scales": q.scales}, weight.shape[1], dtype, size)


def load(found: Found, format: str, act: str, slots: dict[str, Tensor | None], k: int) -> list[Layer | Plain]:
    """The layer of codes (N, K · bits / 8) and scales (N, 1) as the file has them; its weight as floats if a code has no negative."""
    size = found.option("convrot_groupsize", 256, _READABLE)
    if k % size:
        raise found.bad("weight", f"K divisible by the rotation's {size}")
    if _reversible(slots["codes"], format, size):
        return [_made(found.path, format, act, slots, k, found.compute, size)]
    weight = QTensor(slots["codes"], slots["scales"], None, None, format).dequantize()
    note = f"dequantized: {found.mark.format} with a code that has no negative, rotated back"
    parts: list[Layer | Plain] = [Plain(found.name("weight"), rotate(weight, size).to(found.compute), note)]
    return parts + ([Plain(found.name("bias"), slots["bias"])] if slots["bias"] is not None else [])


def refusal(layer: Layer, format: str, act: str) -> str:
    """ "", or why the layer's rotation is not ConvRot's."""
    why = unlike(layer, (format,), (act,), ("smooth",))
    size = layer.layout.hadamard
    if why or size not in _READABLE or layer.shape[1] % size:
        return why or f"its rotation is of size {size}"
    smooth = layer.slots.get("smooth")
    if smooth is None or not torch.equal(smooth.float(), signs(size).repeat(layer.shape[1] // size)):
        return "its rotation has other signs"
    if not _reversible(layer.slots["codes"], format, size):
        return "it has a code without a negative"
    return ""


def codes_of(layer: Layer) -> Tensor:
    """The codes of a layer without refusal, packed, as ComfyUI has them."""
    return _turned(layer.slots["codes"], layer.layout.weight, layer.layout.hadamard)


def _made(
    path: str, format: str, act: str, slots: dict[str, Tensor | None], k: int, dtype: torch.dtype, size: int
) -> Layer:
    smooth = signs(size).repeat(k // size).to(dtype)
    slots = {**slots, "codes": _turned(slots["codes"], format, size), "smooth": smooth}
    return layer(path, format, act, slots, k, dtype, size)


def _turned(codes: Tensor, format: str, size: int) -> Tensor:
    """Packed codes from ConvRot's basis to Sylvester's, or back: column p(j) takes ±column j. Its own inverse."""
    fmt = formats.get(format)
    values = _values(codes, format, size)[..., swapped(size)] * signs(size)
    return fmt.pack((values.flatten(-2).to(torch.int16) & ((1 << fmt.bits) - 1)).to(torch.uint8))  # also the least code


def _values(codes: Tensor, format: str, size: int) -> Tensor:
    fmt = formats.get(format)
    return fmt.element.decode(fmt.unpack(codes)).unflatten(-1, (-1, size))


def _reversible(codes: Tensor, format: str, size: int) -> bool:
    """Whether every code whose sign changes has a negative."""
    least = -float(1 << (formats.get(format).bits - 1))
    return not bool((_values(codes, format, size)[..., signs(size) < 0] == least).any())
