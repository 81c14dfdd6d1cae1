r"""torchao in: tensor subclasses as its safetensors support flattens them.

    a.b.weight  →  a.b._weight_qdata, a.b._weight_scale, …   and in the free text   "a.b.weight": {"_type": class, "_data": {…}}

    Int4Tensor              qdata (N, K/2), low nibble = even column, two's complement; scale, zero_point z (K/g, N); w = q · scale + z
    Int8Tensor              qdata int8 (N, K); scale, zero_point (N, G); w = (q - z) · scale
    IntxUnpackedToInt8Tensor  the same with codes of 1 to 8 bits
    Float8Tensor            qdata float8 (N, K); scale (N, 1) or (1, 1)
    NVFP4Tensor             qdata uint8 (N, K/2); scale float8 (N, K/16); per_tensor_scale (), which multiplies
    MXTensor                qdata fp4 pairs or float8; scale e8m0 (N, K/32)

Scales of the last two may be swizzled into tiles of 128 x 4, which are undone. Other classes are laid out for one device's kernels and are
refused by name. https://github.com/pytorch/ao
"""

__all__ = ["TorchAO"]

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qgen import formats
from qgen.errors import BadCheckpoint
from qgen.io.files import parse
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.layers import Whole, bias_of, check, emit, finite, floats, layer, stream

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_LONGEST = 1 << 16  # characters of one tensor's description


class TorchAO:
    """The importer."""

    about = "torchao safetensors: Int4Tensor, Int8Tensor, Float8Tensor, NVFP4Tensor, MXTensor"

    def recognizes(self, source: Source) -> bool:
        return "tensor_names" in source.metadata and bool(_described(source))

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        described = _described(source)
        layers = {}
        pieces: dict[str, list[str]] = {}
        for name in source.shapes:
            pieces.setdefault(name.rpartition("._")[0], []).append(name)
        for name in described:
            path = name.rpartition(".")[0]
            own = [piece for piece in pieces.get(path, ()) if piece.startswith(_prefix(name))]
            bias = [f"{path}.bias"] if name.endswith(".weight") and f"{path}.bias" in source.shapes else []
            layers[name] = (*own, *bias)
        return stream(source, layers, lambda name: _Tensors(source, name, described[name]).parts())


def _described(source: Source) -> dict[str, tuple[str, str]]:
    """{name: (class, text)} of the tensors that the free text gives a class of their own."""
    found = {}
    for name, text in source.metadata.items():
        if name == "tensor_names" or not text.startswith("{") or len(text) > _LONGEST:
            continue
        try:
            kind = json.loads(text).get("_type")
        except (ValueError, RecursionError):
            continue
        if isinstance(kind, str) and kind != "Tensor" and kind.endswith("Tensor") and "." in name:
            found[name] = (kind, text)
    return found


def _prefix(name: str) -> str:
    path, _, leaf = name.rpartition(".")
    return f"{path}._{leaf}_"


class _Tensors:
    """The pieces of one flattened tensor."""

    def __init__(self, source: Source, name: str, described: tuple[str, str]):
        self.source, self.name, self.prefix = source, name, _prefix(name)
        self.path, _, self.leaf = name.rpartition(".")
        self.kind = described[0]
        data = parse(described[1], source.where).get("_data")
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}

    def parts(self) -> Iterator[Layer | Plain]:
        makers = {
            "Int4Tensor": self.int4,
            "Int8Tensor": self.int8,
            "IntxUnpackedToInt8Tensor": self.int8,
            "Float8Tensor": self.float8,
            "NVFP4Tensor": self.nvfp4,
            "MXTensor": self.mx,
        }
        if self.kind not in makers:
            raise BadCheckpoint(
                f"{self.source.where}: {self.name!r} is torchao's {self.kind[:60]}, laid out for one device's kernels; qgen reads "
                f"{', '.join(makers)}: quantize the float model with qgen, or save with one of those"
            )
        if self.leaf != "weight":
            raise BadCheckpoint(
                f"{self.source.where}: {self.name!r} is quantized and no layer's weight, which qgen cannot hold"
            )
        return makers[self.kind]()

    def int4(self) -> Iterator[Layer | Plain]:
        n, half = self.size("qdata", torch.int8, torch.uint8)
        groups = self.shape("scale")[0]
        self.check("scale", (groups, n), *_FLOATS)
        self.check("zero_point", (groups, n), *_FLOATS)
        block = self.block(2 * half, groups)
        scales, zero = (self.finite(leaf).T.contiguous() for leaf in ("scale", "zero_point"))
        raw = self.read("qdata").view(torch.uint8)
        codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1)
        codes = (codes ^ 8).to(torch.int8) - 8
        whole = Whole(codes, 4, block, scales, offset=zero if bool(zero.any()) else None)
        fp8 = _inner(self.data.get("activation_dtype")) == "float8_e4m3fn"
        return self.emit(whole, "fp8_e4m3_row" if fp8 else "", scales.dtype)

    def int8(self) -> Iterator[Layer | Plain]:
        n, k = self.size("qdata", torch.int8)
        bits = 8 if self.kind == "Int8Tensor" else _bits(_inner(self.data.get("target_dtype")))
        if bits is None:
            raise self.bad("qdata", f"is of {str(self.data.get('target_dtype'))[:60]}, wanted int1 to int8")
        shape = self.shape("scale")
        rows, groups = (shape if len(shape) == 2 else (*shape, 1)) if len(shape) in (1, 2) else (0, 0)
        if rows not in (1, n) or not groups or k % groups:
            raise self.bad("scale", f"has the shape {list(shape)}, which does not divide a weight of {n} x {k}")
        self.check("scale", None, *_FLOATS)
        scales = self.finite("scale").reshape(rows, groups).expand(n, groups).contiguous()
        codes, zero = self.read("qdata"), self.zero(shape, (rows, groups), n)
        middle = 1 << (bits - 1)
        if bits < 8 and not bool(((codes >= -middle) & (codes < middle)).all()):
            raise self.bad("qdata", f"holds codes beyond {bits} bits")
        if zero is not None:
            codes = (codes.to(torch.int16) + middle).to(torch.uint8)
            zero = zero + middle
        act = "int8_row" if _dynamic_rows(self.data.get("act_quant_kwargs")) else ""
        return self.emit(Whole(codes, bits, k // groups, scales, zero), act, self.dtype("dtype"))

    def zero(self, shape: tuple[int, ...], grid: tuple[int, int], n: int) -> Tensor | None:
        """(N, G) whole numbers, None if there are none but zeros."""
        if not self.has("zero_point"):
            return None
        self.check("zero_point", shape, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATS)
        zero = self.finite("zero_point").reshape(grid).expand(n, grid[1]).float()
        if not bool(zero.any()):
            return None
        if not bool(((zero == zero.round()) & (zero.abs() <= 128)).all()):
            raise self.bad("zero_point", "holds what is no whole number of one byte")
        return zero

    def float8(self) -> Iterator[Layer | Plain]:
        n, k = self.size("qdata", *_FLOAT8)
        shape = self.shape("scale")
        if shape not in ((n, 1), (1, 1), (1,), ()):
            raise self.bad("scale", f"has the shape {list(shape)}, wanted one for each of {n} rows or one for all")
        self.check("scale", None, *_FLOATS)
        scales = self.finite("scale").float().reshape(-1, 1).expand(n, 1).contiguous()
        raw = self.read("qdata")
        name = f"fp8_{_FLOAT8[raw.dtype]}_row"
        act = "fp8_e4m3_row" if _dynamic_rows(self.data.get("act_quant_kwargs")) else ""
        return self.packed(name, (n, k), {"codes": raw.view(torch.uint8), "scales": scales}, act, self.dtype("dtype"))

    def nvfp4(self) -> Iterator[Layer | Plain]:
        n, half = self.size("qdata", torch.uint8)
        if self.data.get("block_size") != 16 or half % 8:
            raise self.bad(
                "qdata",
                f"has blocks of {str(self.data.get('block_size'))[:20]}, wanted 16 that divide {2 * half} columns",
            )
        scales = self.scales(n, half // 8, torch.float8_e4m3fn)
        if self.has("per_tensor_scale"):
            self.check("per_tensor_scale", None, torch.float32)
            shared = self.finite("per_tensor_scale")
            if shared.numel() != 1:
                raise self.bad("per_tensor_scale", "must be one number")
        else:
            shared = torch.ones(())
        slots = {"codes": self.read("qdata"), "scales": scales, "global_scale": shared.reshape(())}
        act = "nvfp4_dynamic" if self.data.get("act_quant_kwargs") else ""
        return self.packed("nvfp4", (n, 2 * half), slots, act, self.dtype("orig_dtype"))

    def mx(self) -> Iterator[Layer | Plain]:
        element = _inner(self.data.get("elem_dtype"))
        per, name = {
            "float4_e2m1fn_x2": (2, "mxfp4"),
            "float8_e4m3fn": (1, "mxfp8_e4m3"),
            "float8_e5m2": (1, "mxfp8_e5m2"),
        }.get(element, (0, ""))
        if not per:
            raise self.bad("qdata", f"is MX of {str(element)[:40]}; qgen reads fp4 and fp8")
        n, width = self.size("qdata", torch.uint8, *_FLOAT8)
        if self.data.get("block_size") != 32 or width * per % 32:
            raise self.bad(
                "qdata",
                f"has blocks of {str(self.data.get('block_size'))[:20]}, wanted 32 that divide {width * per} columns",
            )
        scales = self.scales(n, width * per // 32, torch.float8_e8m0fnu, torch.uint8).view(torch.uint8)
        if bool((scales == 255).any()):
            raise self.bad("scale", "holds scales that are NaN")
        raw = self.read("qdata")
        if name in formats.formats:
            act = name if self.data.get("act_quant_kwargs") else ""
            yield from self.packed(
                name,
                (n, width * per),
                {"codes": raw.view(torch.uint8), "scales": scales},
                act,
                self.dtype("orig_dtype"),
            )
            return
        values = (raw.float().unflatten(1, (-1, 32)) * torch.exp2(scales.float() - 127)[..., None]).flatten(1)
        yield from floats(self.path, values, bias_of(self.source, self.path, n), f"dequantized: MX of {element}")

    def scales(self, n: int, groups: int, *dtypes: torch.dtype) -> Tensor:
        """Scales (N, G), unswizzled: tiles of 128 x 4 lie as (32, 4, 4), row 32 a + b at (b, a)."""
        if self.data.get("is_swizzled_scales") is not True:
            self.check("scale", (n, groups), *dtypes)
            scales = self.read("scale")
        else:
            rows, columns = -(-n // 128), -(-groups // 4)
            self.check("scale", None, *dtypes)
            raw = self.read("scale")
            if raw.numel() != rows * columns * 512:
                raise self.bad("scale", f"has the shape {list(raw.shape)}, wanted {rows} x {columns} tiles of 128 x 4")
            tiles = raw.view(torch.uint8).reshape(rows, columns, 32, 4, 4).permute(0, 3, 2, 1, 4)
            scales = tiles.reshape(rows * 128, columns * 4)[:n, :groups].contiguous().view(raw.dtype)
        if scales.dtype == torch.float8_e4m3fn:
            finite(self.source, self.prefix + "scale", scales)
        return scales

    def emit(self, whole: Whole, act: str, dtype: torch.dtype) -> Iterator[Layer | Plain]:
        bias = bias_of(self.source, self.path, len(whole.codes))
        if not self.has("act_pre_scale"):
            return emit(self.path, whole, bias=bias, act=act, dtype=dtype, said=f"torchao {self.kind}")
        values = whole.dequantize()
        return floats(
            self.path,
            values * self.before(values.shape[1]),
            bias,
            f"dequantized: torchao {self.kind} with act_pre_scale",
        )

    def packed(
        self, name: str, shape: tuple[int, int], slots: dict[str, Tensor], act: str, dtype: torch.dtype
    ) -> Iterator[Layer | Plain]:
        bias = bias_of(self.source, self.path, shape[0])
        yield layer(self.path, shape, name, slots, bias, act=act, dtype=dtype, note=f"torchao {self.kind}")

    def before(self, k: int) -> Tensor:
        """(K,) by which inputs are multiplied, and so may be columns of the weight."""
        self.check("act_pre_scale", None, *_FLOATS)
        scale = self.finite("act_pre_scale").float().reshape(-1)
        if len(scale) not in (1, k):
            raise self.bad("act_pre_scale", f"has {len(scale)} numbers for {k} columns")
        return scale

    def block(self, k: int, groups: int) -> int:
        said = self.data.get("block_size")
        block = said[-1] if isinstance(said, list) and said and type(said[-1]) is int and said[-1] > 0 else 0
        if not block or -(-k // block) != groups:
            raise self.bad("scale", f"has {groups} groups for {k} columns in blocks of {block or said}")
        return block

    def dtype(self, key: str) -> torch.dtype:
        name = _inner(self.data.get(key))
        return next((dtype for dtype in _FLOATS if str(dtype)[6:] == name), torch.bfloat16)

    def has(self, leaf: str) -> bool:
        return self.prefix + leaf in self.source.shapes

    def shape(self, leaf: str) -> tuple[int, ...]:
        check(self.source, self.prefix + leaf, None)
        return self.source.shapes[self.prefix + leaf]

    def size(self, leaf: str, *dtypes: torch.dtype) -> tuple[int, int]:
        shape = self.shape(leaf)
        self.check(leaf, None, *dtypes)
        if len(shape) != 2 or not all(shape):
            raise self.bad(leaf, f"has the shape {list(shape)}, wanted a matrix")
        return shape

    def check(self, leaf: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> None:
        check(self.source, self.prefix + leaf, shape, *dtypes)

    def read(self, leaf: str) -> Tensor:
        return self.source.read(self.prefix + leaf)

    def finite(self, leaf: str) -> Tensor:
        return finite(self.source, self.prefix + leaf, self.read(leaf))

    def bad(self, leaf: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.source.where}: {self.prefix + leaf!r} {what}")


def _inner(value: Any) -> Any:
    """The value of {"_type": "torch.dtype", "_data": value}, None for anything else."""
    return value.get("_data") if isinstance(value, dict) and isinstance(value.get("_data"), str) else None


def _bits(name: Any) -> int | None:
    return int(name[3:]) if isinstance(name, str) and name in {f"int{b}" for b in range(1, 9)} else None


def _dynamic_rows(said: Any) -> bool:
    """Whether activations are quantized at run time, one symmetric scale per row."""
    data = said.get("_data") if isinstance(said, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("granularity"), dict):
        return False
    mapping = data.get("mapping_type")
    symmetric = mapping is None or (isinstance(mapping, dict) and mapping.get("_data") == "SYMMETRIC")
    return data["granularity"].get("_type") == "PerRow" and symmetric


importers.add("torchao", TorchAO())
