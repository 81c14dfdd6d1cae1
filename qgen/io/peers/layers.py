r"""From a peer's whole numbers, scales and zeros to a `Layer`; and what importers of safetensors share: grouping, checking, bit streams.

A weight stays packed if some format means the same bit for bit: the narrowest registered integer format that holds the codes, with the
file's block and scales in the file's dtype,

    int{b}_g{g}      q · s                 codes may be -2^(b-1), which qgen itself never writes
    uint{b}_g{g}     u · s + offset
    uint{b}z_g{g}    (u - z) · s
    int{b}o_g{g}     q · s + offset

with the suffix _f16 or _f32 unless scales are bfloat16; scales of a whole row become float32, which holds them all. Else it is dequantized
in float32 and the note says why.
"""

__all__ = [
    "Whole",
    "bias_of",
    "bits_to_words",
    "check",
    "compute_dtype",
    "emit",
    "finite",
    "floats",
    "layer",
    "stream",
    "words_to_bits",
]

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.formats import packing
from qgen.io.peers.base import Layer, Plain, Source
from qgen.nn.packed import Layout

_SUFFIX = {torch.bfloat16: "", torch.float16: "_f16", torch.float32: "_f32"}
_WIDTHS = range(1, 9)


@dataclass(frozen=True)
class Whole:
    """A weight (N, K) as a peer stores it, once its words are unpacked.

    codes: (N, K), int8 if signed, else uint8. bits: width of a code. block: neighbours along K that share a scale. scales: (N, G) with
    G = ⌈K / block⌉. zero: (N, G) whole numbers, subtracted from unsigned codes. offset: (N, G) floats, added to the product.
    """

    codes: Tensor
    bits: int
    block: int
    scales: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None

    @property
    def format(self) -> str | None:
        """Name of the format that means the same, None if there is none."""
        row = self.scales.shape[1] == 1 and self.block >= self.codes.shape[1]
        signed = self.codes.dtype == torch.int8
        kind = ("o" if self.offset is not None else "") if signed else ("z" if self.zero is not None else "")
        if not signed and self.zero is None and self.offset is None:
            return None
        where = "row" if row else f"g{self.block}{_SUFFIX[self.scales.dtype]}"
        names = (f"{'int' if signed else 'uint'}{bits}{kind}_{where}" for bits in _WIDTHS if bits >= self.bits)
        return next((name for name in names if name in formats.formats), None)

    def dequantize(self) -> Tensor:
        """(N, K) float32."""
        k = self.codes.shape[1]
        groups = (torch.arange(k) // self.block).clamp_(max=self.scales.shape[1] - 1)
        values = self.codes.float()
        if self.zero is not None:
            values -= self.zero.float()[:, groups]
        values *= self.scales.float()[:, groups]
        return values if self.offset is None else values.add_(self.offset.float()[:, groups])

    def slots(self, name: str) -> dict[str, Tensor]:
        """Canonical tensors of the format `name`."""
        fmt = formats.get(name)
        codes = self.codes.view(torch.uint8) & ((1 << fmt.bits) - 1)
        pad = formats.padded(codes.shape[1], name) - codes.shape[1]
        codes = torch.nn.functional.pad(codes, (0, pad)) if pad else codes
        slots = {"codes": packing.pack(codes, fmt.bits), "scales": self.scales.to(fmt.scale_dtype).contiguous()}
        zero = self.zero if self.offset is None else self.offset
        if zero is not None:
            slots["zero"] = zero.to(fmt.scale_dtype).contiguous()
        return slots


def emit(
    path: str,
    whole: Whole,
    *,
    shape: tuple[int, ...] | None = None,
    bias: tuple[str, Tensor] | None = None,
    act: str = "",
    more: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    said: str = "",
) -> Iterator[Layer | Plain]:
    """The weight as a Layer with its bias, or dequantized, its bias beside it.

    shape: of the float weight, if not (N, K). more: other slots. said: the peer's name for the format, for notes.
    """
    name = whole.format
    if name is None:
        why = f"{whole.bits}-bit codes in blocks of {whole.block} with {str(whole.scales.dtype)[6:]} scales"
        yield from floats(
            path, whole.dequantize().reshape(shape or whole.codes.shape), bias, f"dequantized: {said or why}"
        )
        return
    slots = whole.slots(name) | (more or {})
    yield layer(path, shape or tuple(whole.codes.shape), name, slots, bias, act=act, dtype=dtype, note=said)


def layer(
    path: str,
    shape: tuple[int, ...],
    name: str,
    slots: dict[str, Tensor],
    bias: tuple[str, Tensor] | None = None,
    *,
    act: str = "",
    dtype: torch.dtype = torch.bfloat16,
    note: str = "",
) -> Layer:
    """A Layer of the weight format `name`, from canonical tensors and a bias as `bias_of` gives it."""
    if bias is not None:
        slots = {**slots, "bias": bias[1]}
    present = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    return Layer(path, tuple(shape), Layout(name, act, slots=present), slots, dtype, note)


def floats(path: str, weight: Tensor, bias: tuple[str, Tensor] | None, note: str) -> Iterator[Plain]:
    """A dequantized weight, and the bias that would have been its layer's."""
    yield Plain(f"{path}.weight" if path else "weight", weight, note)
    if bias is not None:
        yield Plain(*bias)


def stream(
    source: Source, layers: dict[str, tuple[str, ...]], make: Callable[[str], Iterable[Layer | Plain]]
) -> Iterator[Layer | Plain]:
    """The parts of a file in its order: `make(path)` at the first tensor of each layer, other tensors as they are.

    layers: path of each layer to the names of all tensors that belong to it.
    """
    owner = {name: path for path, names in layers.items() for name in names}
    done: set[str] = set()
    for name in source.shapes:
        path = owner.get(name)
        if path is None:
            yield Plain(name, source.read(name))
        elif path not in done:
            done.add(path)
            yield from make(path)


def bias_of(source: Source, path: str, n: int) -> tuple[str, Tensor] | None:
    """(name, tensor) of a layer's bias (N,) in a float dtype, None if it has none. Another tensor of that name is damage."""
    name = f"{path}.bias" if path else "bias"
    if name not in source.shapes:
        return None
    check(source, name, (n,), torch.bfloat16, torch.float16, torch.float32)
    return name, source.read(name)


def check(source: Source, name: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
    """BadCheckpoint, naming the tensor, unless it is there, of one of `dtypes`, and of `shape` (None: whatever)."""
    if name not in source.shapes:
        raise BadCheckpoint(f"{source.where}: {name!r} is not there")
    found, dtype = source.shapes[name], source.dtypes[name]
    if shape is not None and found != shape:
        raise BadCheckpoint(f"{source.where}: {name!r} must have the shape {list(shape)}, found {list(found)}")
    if dtypes and dtype not in dtypes:
        wanted = " or ".join(str(d)[6:] for d in dtypes)
        raise BadCheckpoint(f"{source.where}: {name!r} must be {wanted}, found {str(dtype)[6:]}")


def compute_dtype(scales: Tensor) -> torch.dtype:
    """In which dtype a layer computes whose scales are these: theirs if it has 16 bits, else bfloat16."""
    return scales.dtype if scales.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def finite(source: Source, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; BadCheckpoint if a scale is NaN or infinite."""
    if not bool(tensor.float().isfinite().all()):
        raise BadCheckpoint(f"{source.where}: {name!r} holds scales that are NaN or infinite")
    return tensor


def words_to_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes (R, count) uint8 from a stream of `bits`-wide codes in words (R, W) int32, low bits of the first word first."""
    raw = words.reshape(-1).view(torch.uint8).view(len(words), -1)  # (R, 4 W) on a little-endian machine
    size = -(-count // 8) * bits  # 8 codes fill `bits` bytes
    raw = torch.nn.functional.pad(raw, (0, max(0, size - raw.shape[1])))[:, :size]
    return packing.unpack(raw, bits)[:, :count].contiguous()


def bits_to_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `words_to_bits`: codes (R, count) uint8 to words (R, ⌈count · bits / 32⌉) int32."""
    count = codes.shape[1]
    raw = packing.pack(torch.nn.functional.pad(codes, (0, -count % 32)), bits)
    raw = raw.clone(memory_format=torch.contiguous_format)
    return raw.view(torch.int32)[:, : -(-count * bits // 32)].contiguous()
