"""One quantized linear of a Nunchaku file, read: shapes and dtypes come first, and BadCheckpoint names the tensor that does not fit."""

__all__ = ["TAILS", "read_awq", "read_svdq", "refuse"]

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint
from qgen.io.peers import nunchaku_packing as packing
from qgen.io.peers.base import Source
from qgen.io.peers.nunchaku_linear import SHIFT, Linear

# Names of today's files, and the older ones that mean the same.
TAILS = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}
_SVDQ = {
    "qweight",
    "wscales",
    "bias",
    "smooth_factor",
    "smooth_factor_orig",
    "proj_down",
    "proj_up",
    "wtscale",
    "wcscales",
}
_AWQ = {"qweight", "wscales", "wzeros", "bias"}
_HALF = (torch.bfloat16, torch.float16)
_FLOATS = (*_HALF, torch.float32)


def read_svdq(source: Source, stem: str, names: dict[str, str], unsigned: bool = False) -> Linear:
    """A W4A4 layer. names: the file's name of each tail in TAILS' new spelling. unsigned: the input is shifted, if INT4."""
    _known(source, stem, names, _SVDQ)
    n, k = _shape2(source, names["qweight"], (torch.int8,))
    k *= 2
    if n % packing.ROWS or k % packing.ROWS:
        refuse(source, names["qweight"], f"N and K in multiples of {packing.ROWS}")
    kind = "nvfp4" if source.dtypes.get(names.get("wscales", "")) == torch.float8_e4m3fn else "int4"
    block, dtypes = (16, (torch.float8_e4m3fn,)) if kind == "nvfp4" else (64, _HALF)
    scales = _read(source, stem, names, "wscales", (k // block, n), dtypes)
    down, up = _lowrank(source, stem, names, n, k)
    smooth = _maybe(source, stem, names, "smooth_factor", (k,))
    bias = _maybe(source, stem, names, "bias", (n,))
    dtype = next((t.dtype for t in (bias, smooth, up, scales) if t is not None and t.dtype in _FLOATS), torch.bfloat16)
    shifted = unsigned and kind == "int4"
    return Linear(
        kind,
        n,
        k,
        packing.unpack_codes(source.read(names["qweight"])),
        (packing.unpack_micro if kind == "nvfp4" else packing.unpack_scales)(scales),
        dtype,
        act="uint4p_g64" if shifted else "int4_g64" if kind == "int4" else "nvfp4_dynamic",
        channel=_channel(source, stem, names, n) if kind == "nvfp4" else None,
        smooth=None if smooth is None else packing.unpack_vector(smooth),
        down=None if down is None else packing.unpack_down(down),
        up=None if up is None else packing.unpack_up(up),
        bias=None if bias is None else packing.unpack_vector(bias),
        shift=torch.tensor(SHIFT, dtype=dtype) if shifted else None,
    )


def read_awq(source: Source, stem: str, names: dict[str, str]) -> Linear:
    """A W4A16 layer with zero points."""
    _known(source, stem, names, _AWQ)
    n, k = _shape2(source, names["qweight"], (torch.int32,))
    n, k = n * 4, k * 2
    if k % 64:
        refuse(source, names["qweight"], "K in multiples of 64")
    scales = _read(source, stem, names, "wscales", (k // 64, n), _HALF)
    zeros = _read(source, stem, names, "wzeros", (k // 64, n), (scales.dtype,))
    codes = packing.unpack_awq(source.read(names["qweight"]))
    bias = _maybe(source, stem, names, "bias", (n,))
    return Linear("awq", n, k, codes, scales.T.contiguous(), scales.dtype, zero=zeros.T.contiguous(), bias=bias)


def refuse(source: Source, name: str, wanted: str) -> None:
    """Raises BadCheckpoint about the tensor `name`."""
    if name not in source.shapes:
        raise BadCheckpoint(f"{source.where}: lacks {name!r}: wanted {wanted}")
    found = f"{str(source.dtypes[name])[6:]} {tuple(source.shapes[name])}"
    raise BadCheckpoint(f"{source.where}: {name!r} is {found}: wanted {wanted}")


def _known(source: Source, stem: str, names: dict[str, str], tails: set[str]) -> None:
    for tail in sorted(names.keys() - tails):
        raise BadCheckpoint(
            f"{source.where}: {names[tail]!r} is no part of a quantized layer: known: {', '.join(sorted(tails))}"
        )


def _shape2(source: Source, name: str, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    shape = source.shapes[name]
    if len(shape) != 2 or source.dtypes[name] not in dtypes or 0 in shape:
        refuse(source, name, f"a matrix of {_list(dtypes)}")
    return shape[0], shape[1]


def _read(
    source: Source, stem: str, names: dict[str, str], tail: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    name = names.get(tail, f"{stem}.{tail}")
    if source.shapes.get(name) != shape or source.dtypes[name] not in dtypes:
        refuse(source, name, f"{_list(dtypes)} {shape}")
    return source.read(name)


def _maybe(source: Source, stem: str, names: dict[str, str], tail: str, shape: tuple[int, ...]) -> Tensor | None:
    return _read(source, stem, names, tail, shape, _FLOATS) if tail in names else None


def _lowrank(source: Source, stem: str, names: dict[str, str], n: int, k: int) -> tuple[Tensor | None, Tensor | None]:
    if "proj_down" not in names and "proj_up" not in names:
        return None, None
    shape = source.shapes.get(names.get("proj_down", ""), ())
    if len(shape) != 2 or shape[1] % 16:
        refuse(source, names.get("proj_down", f"{stem}.proj_down"), f"({k}, R) with R in multiples of 16")
    down = _read(source, stem, names, "proj_down", (k, shape[1]), _FLOATS)
    up = _read(source, stem, names, "proj_up", (n, shape[1]), _FLOATS)
    return (down, up) if shape[1] else (None, None)


def _channel(source: Source, stem: str, names: dict[str, str], n: int) -> Tensor:
    """(N, 1) float32: the tensor's scale times each channel's."""
    scale = torch.ones(n, 1)
    if "wcscales" in names and source.shapes[names["wcscales"]] != (0,):  # empty = none
        scale = packing.unpack_vector(_read(source, stem, names, "wcscales", (n,), _FLOATS)).float()[:, None]
    if "wtscale" in names:
        shape = (1,) if source.shapes[names["wtscale"]] else ()
        scale = scale * _read(source, stem, names, "wtscale", shape, _FLOATS).float().reshape(())
    if not bool(scale.isfinite().all()):
        refuse(source, names.get("wtscale", names.get("wcscales", "")), "finite scales")
    return scale


def _list(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype)[6:] for dtype in dtypes)
