r"""compressed-tensors in (llm-compressor, vLLM): pack-quantized, int-quantized, float-quantized, nvfp4-pack and mxfp4-pack.

    pack-quantized   weight_packed int32 (N, ⌈K·b/32⌉), a bit stream along K of codes + 2^(b-1); weight_scale (N, G); weight_shape (2,);
                     weight_zero_point int32 (⌈N·b/32⌉, G), packed alike along N; weight_g_idx (K,) where columns were reordered
    int-quantized    weight int8, weight_scale, weight_zero_point int8
    float-quantized  weight float8_e4m3fn, weight_scale
    nvfp4-pack       weight_packed uint8 (N, K/2), weight_scale float8 (N, K/16), weight_global_scale (1,), which divides
    mxfp4-pack       weight_packed uint8 (N, K/2), weight_scale uint8 (N, K/32)

Which it is shows in names and dtypes; what activations do is said by quantization_config. Where this differs from the library in the last
bit: it multiplies in the dtype of the scales, qgen in float32; and for nvfp4 it divides each scale by the global one, qgen multiplies by
the reciprocal. https://github.com/vllm-project/compressed-tensors
"""

__all__ = ["CompressedTensors"]

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.peers.base import Layer, Plain, Source, importers
from qgen.io.peers.layers import (
    Whole,
    bias_of,
    check,
    compute_dtype,
    emit,
    finite,
    floats,
    layer,
    stream,
    words_to_bits,
)

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LEAVES = (
    *(
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "weight_global_scale",
    ),
    *("input_global_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point", "bias"),
)
_MOST = 1 << 24  # rows or columns beyond this are damage


class CompressedTensors:
    """The importer."""

    about = "compressed-tensors (llm-compressor, vLLM): packed integers, int8, fp8, NVFP4, MXFP4"

    def recognizes(self, source: Source) -> bool:
        config = _config(source)
        if config:
            return config.get("quant_method") == "compressed-tensors"
        for name, dtype in source.dtypes.items():
            path, _, leaf = name.rpartition(".")
            beside = "weight_shape" if dtype == torch.int32 else "weight_global_scale"
            if leaf == "weight_packed" and dtype in (torch.int32, torch.uint8) and f"{path}.{beside}" in source.shapes:
                return f"{path}.weight_scale" in source.shapes
        return False

    def parts(self, source: Source) -> Iterator[Layer | Plain]:
        config = _config(source)
        layers = {}
        for name in source.shapes:
            path, _, leaf = name.rpartition(".")
            if leaf == "weight_scale":
                prefix = f"{path}." if path else ""
                layers[path] = tuple(prefix + leaf for leaf in _LEAVES if prefix + leaf in source.shapes)
        return stream(source, layers, lambda path: _Weight(source, path, _scheme(config, path)).parts())


class _Weight:
    """The tensors of one layer, and the scheme that the config gives it ({} if it says nothing)."""

    def __init__(self, source: Source, path: str, scheme: dict[str, Any]):
        self.source, self.path, self.scheme = source, path, scheme
        self.prefix = f"{path}." if path else ""

    def parts(self) -> Iterator[Layer | Plain]:
        if self.has("weight_packed"):
            packed = self.source.dtypes[self.prefix + "weight_packed"]
            return self.integers() if packed == torch.int32 else self.fours()
        check(self.source, self.prefix + "weight", None, torch.int8, torch.float8_e4m3fn)
        return self.bytes() if self.source.dtypes[self.prefix + "weight"] == torch.int8 else self.float8()

    def integers(self) -> Iterator[Layer | Plain]:
        n, k = self.shape()
        words = self.size("weight_packed", 2)
        bits = _width(k, words[1], self.scheme.get("weights", {}).get("num_bits"))
        if words[0] != n or bits is None:
            raise self.bad("weight_packed", f"holds {list(words)} words, which are no {n} rows of {k} codes")
        groups, block = self.groups(n, k)
        scales = self.scales((n, groups))
        codes = words_to_bits(self.read("weight_packed", torch.int32), bits, k)
        zero = None
        if self.has("weight_zero_point"):
            check(self.source, self.prefix + "weight_zero_point", (-(-n * bits // 32), groups), torch.int32)
            zero = words_to_bits(self.read("weight_zero_point").T, bits, n).T
        else:
            codes = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        whole = Whole(codes, bits, block, scales, zero)
        index = self.order(k, groups, block)
        if index is not None:
            yield from floats(
                self.path,
                _gathered(whole, index),
                bias_of(self.source, self.path, n),
                "dequantized: columns in another order",
            )
            return
        yield from self.emit(whole, "pack-quantized")

    def bytes(self) -> Iterator[Layer | Plain]:
        n, k = self.size("weight", 2)
        groups, block = self.groups(n, k)
        scales = self.scales((n, groups))
        codes, zero = self.read("weight"), None
        if self.has("weight_zero_point"):
            check(
                self.source,
                self.prefix + "weight_zero_point",
                self.source.shapes[self.prefix + "weight_scale"],
                torch.int8,
            )
            zero = self.read("weight_zero_point").reshape(-1, groups).expand(n, groups)
            codes, zero = codes.view(torch.uint8) ^ 128, zero.contiguous().view(torch.uint8) ^ 128
        return self.emit(Whole(codes, 8, block, scales, zero), "int-quantized")

    def float8(self) -> Iterator[Layer | Plain]:
        n, k = self.size("weight", 2)
        rows, columns = self.tiles(n, k)
        scales = self.read("weight_scale", *_FLOATS).float().reshape(rows, columns)
        finite(self.source, self.prefix + "weight_scale", scales)
        weight, bias = self.read("weight"), bias_of(self.source, self.path, n)
        if columns == 1 and rows in (1, n):
            slots = {"codes": weight.view(torch.uint8), "scales": scales.expand(n, 1).contiguous()}
            act, more = self.act()
            yield layer(self.path, (n, k), "fp8_e4m3_row", slots | more, bias, act=act, note="float-quantized")
            return
        of_row = torch.arange(n) * rows // n
        of_column = torch.arange(k) * columns // k
        values = weight.float() * scales[of_row][:, of_column]
        yield from floats(self.path, values, bias, f"dequantized: float8 in tiles of {n // rows} x {k // columns}")

    def fours(self) -> Iterator[Layer | Plain]:
        n, half = self.size("weight_packed", 2)
        check(self.source, self.prefix + "weight_packed", None, torch.uint8)
        slots = {"codes": self.read("weight_packed")}
        name = "nvfp4" if self.has("weight_global_scale") else "mxfp4"
        block, dtype = (16, torch.float8_e4m3fn) if name == "nvfp4" else (32, torch.uint8)
        if 2 * half % block:
            raise self.bad("weight_packed", f"holds rows of {2 * half} codes, which are no blocks of {block}")
        check(self.source, self.prefix + "weight_scale", (n, 2 * half // block), dtype)
        slots["scales"] = self.read("weight_scale")
        if name == "nvfp4":
            finite(self.source, self.prefix + "weight_scale", slots["scales"])
            shared = self.read("weight_global_scale", torch.float32)
            if shared.numel() != 1 or not 0 < float(shared) < float("inf"):
                raise self.bad("weight_global_scale", "must be one number above 0")
            slots["global_scale"] = (1.0 / shared).reshape(())
        elif bool((slots["scales"] == 255).any()):
            raise self.bad("weight_scale", "holds scales that are NaN")
        act, more = self.act()
        bias = bias_of(self.source, self.path, n)
        yield layer(self.path, (n, 2 * half), name, slots | more, bias, act=act, note=f"{name}-pack-quantized")

    def emit(self, whole: Whole, said: str) -> Iterator[Layer | Plain]:
        act, more = self.act()
        bias = bias_of(self.source, self.path, len(whole.codes))
        return emit(self.path, whole, bias=bias, act=act, more=more, dtype=compute_dtype(whole.scales), said=said)

    def shape(self) -> tuple[int, int]:
        check(self.source, self.prefix + "weight_shape", (2,), torch.int64, torch.int32)
        n, k = self.read("weight_shape").tolist()
        if not (0 < n <= _MOST and 0 < k <= _MOST):
            raise self.bad("weight_shape", f"says {n} x {k}")
        return n, k

    def groups(self, n: int, k: int) -> tuple[int, int]:
        """(G, columns per group) for scales of groups, rows or the whole tensor."""
        rows, groups = self.tiles(n, k)
        if rows not in (1, n) or (rows == 1 < n and groups != 1):
            raise self.bad("weight_scale", f"has one scale for {n // rows} rows, wanted one for each row or for all")
        return groups, k // groups

    def tiles(self, n: int, k: int) -> tuple[int, int]:
        """How many scales there are along N and K; each must divide the weight evenly."""
        shape = self.source.shapes[self.prefix + "weight_scale"]
        found = (1, 1) if shape in ((), (1,)) else (*shape, 1) if len(shape) == 1 else shape
        if len(found) != 2 or not all(found) or n % found[0] or k % found[1]:
            raise self.bad("weight_scale", f"has the shape {list(shape)}, which does not divide a weight of {n} x {k}")
        return found

    def scales(self, shape: tuple[int, int]) -> Tensor:
        scales = finite(self.source, self.prefix + "weight_scale", self.read("weight_scale", *_FLOATS))
        return scales.reshape(-1, shape[1]).expand(shape).contiguous()

    def order(self, k: int, groups: int, block: int) -> Tensor | None:
        """Group of each column, None if they lie in order."""
        if not self.has("weight_g_idx"):
            return None
        check(self.source, self.prefix + "weight_g_idx", (k,), torch.int32, torch.int64)
        index = self.read("weight_g_idx").long()
        if bool((index == -1).all()) or torch.equal(index, torch.arange(k) // block):
            return None
        if not bool(((index >= 0) & (index < groups)).all()):
            raise self.bad("weight_g_idx", f"names groups beyond the {groups} that there are")
        return index

    def act(self) -> tuple[str, dict[str, Tensor]]:
        """Format of activations and the slots it needs, from the scheme."""
        said = self.scheme.get("input_activations") or {}
        kind = (said.get("type"), said.get("num_bits"), said.get("strategy"))
        if kind == ("float", 4, "tensor_group"):
            return "nvfp4_dynamic", {}
        act = "int8_row" if kind[:2] == ("int", 8) else "fp8_e4m3_row" if kind[:2] == ("float", 8) else ""
        symmetric = said.get("symmetric", True)
        if act and said.get("dynamic") and kind[2] == "token" and symmetric:
            return act, {}
        if act and kind[2] == "tensor" and symmetric and self.has("input_scale"):
            scale = finite(self.source, self.prefix + "input_scale", self.read("input_scale", *_FLOATS))
            if scale.numel() == 1:
                return act, {"act_scale": scale.float().reshape(1)}
        return "", {}

    def has(self, leaf: str) -> bool:
        return self.prefix + leaf in self.source.shapes

    def size(self, leaf: str, rank: int) -> tuple[int, ...]:
        shape = self.source.shapes[self.prefix + leaf]
        if len(shape) != rank or not all(shape):
            raise self.bad(leaf, f"has the shape {list(shape)}, wanted {rank} sizes above 0")
        return shape

    def read(self, leaf: str, *dtypes: torch.dtype) -> Tensor:
        check(self.source, self.prefix + leaf, None, *dtypes)
        return self.source.read(self.prefix + leaf)

    def bad(self, leaf: str, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.source.where}: {self.prefix + leaf!r} {what}")


def _gathered(whole: Whole, index: Tensor) -> Tensor:
    """Values where column k belongs to group index[k]."""
    values = whole.codes.float()
    if whole.zero is not None:
        values -= whole.zero.float()[:, index]
    return values * whole.scales.float()[:, index]


def _width(k: int, words: int, said: Any) -> int | None:
    """Bits per code that make ⌈k · bits / 32⌉ words: what the config says if it fits, else the only one that does."""
    able = [bits for bits in range(1, 9) if -(-k * bits // 32) == words]
    if said is not None:
        return said if said in able else None
    return able[0] if len(able) == 1 else None


def _config(source: Source) -> dict[str, Any]:
    """quantization_config from config.json or, in a file by itself, from its free text; {} if there is none."""
    found = source.config.get("quantization_config") or source.config.get("compression_config")
    if found is None and "quantization_config" in source.metadata:
        try:
            found = json.loads(source.metadata["quantization_config"])
        except (ValueError, RecursionError):
            found = None
    return found if isinstance(found, dict) else {}


def _scheme(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The config group whose targets name the layer; one that names classes serves the layers that no other names."""
    groups = config.get("config_groups")
    groups = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    groups = [
        {k: v if isinstance(v, dict) else {} for k, v in g.items() if k != "targets"} | {"targets": g.get("targets")}
        for g in groups
    ]
    by_class = []
    for group in groups:
        targets = group["targets"] if isinstance(group["targets"], list) else []
        for target in filter(lambda t: isinstance(t, str), targets):
            if target == path or (target.startswith("re:") and _matches(target[3:], path)):
                return group
        if any(isinstance(t, str) and t.isidentifier() and "." not in t for t in targets):
            by_class.append(group)
    return by_class[0] if by_class else {}


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern of literal pieces, `.*` between them and `$` at its end matches the start of a path.

    Others match nothing: a stranger's regular expression could run for ever.
    """
    whole = pattern.endswith("$")
    pieces = [piece.replace("\\.", ".") for piece in pattern.removeprefix("^").removesuffix("$").split(".*")]
    if any(set(piece) & set("\\*+?()[]{}|^$") for piece in pieces):
        return False
    if not path.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:-1]:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    if len(pieces) == 1:
        return not whole or at == len(path)
    if whole:
        return path.endswith(pieces[-1]) and len(path) - len(pieces[-1]) >= at
    return path.find(pieces[-1], at) >= 0


importers.add("compressed-tensors", CompressedTensors())
