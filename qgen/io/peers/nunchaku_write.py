r"""One qgen layer as Nunchaku's tensors: what its kernels can compute, and how it is written.

| kernel | weights | activations | beside |
|---|---|---|---|
| W4A4 INT4 | int4_g64 | int4_g64; uint4p_g64 with a shift of 0.171875 after GELU | smoothing, low rank, bias |
| W4A4 NVFP4 | nvfp4, nvfp4_row | nvfp4_dynamic | smoothing, low rank, bias |
| W4A16 | int4_g64, uint4_g64 | float | bias |

`int4_g64` becomes W4A16's unsigned codes exactly: u = q + 8, zero = -8 · scale. A float32 tensor scale becomes the product of two 16-bit
floats, wtscale · wcscales: of the 2^m mantissas that wcscales may have, the one with the least error, 2^-16 for a typical bfloat16 one and
below 2^-12 for any.
Files are in one 16-bit dtype: what is stored here in another is rounded to it, and `Written.rounded` says what.
"""

__all__ = [
    "Written",
    "awq_linear",
    "awq_refusal",
    "level",
    "rank_of",
    "scale_pair",
    "svdq_linear",
    "svdq_refusal",
    "write_awq",
    "write_svdq",
]

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qgen.io.peers import nunchaku_packing as packing
from qgen.io.peers.base import Layer
from qgen.io.peers.nunchaku_linear import Linear
from qgen.io.peers.source import open_source
from qgen.io.peers.writer import SafetensorsWriter

_W4A4 = {("int4_g64", "int4_g64"): "int4", ("nvfp4", "nvfp4_dynamic"): "nvfp4", ("nvfp4_row", "nvfp4_dynamic"): "nvfp4"}
_W4A16 = ("int4_g64", "uint4_g64")
_RANK = 16  # ranks come in multiples of this


@dataclass
class Written:
    """Tensors of one layer by tail, in today's spelling. rounded: the tails whose numbers the dtype of the file changed."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def cast(self, tail: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        out = t.to(dtype)
        if not torch.equal(out.float(), t.float()):
            self.rounded.append(tail)
        return out


def svdq_refusal(layer: Layer, unsigned: bool = False) -> str | None:
    """Why W4A4 kernels cannot compute the layer, None if they can. unsigned: whether this one's kernel shifts its input."""
    layout = layer.layout
    formats = (layout.weight, layout.act)
    if unsigned and formats == ("int4_g64", "uint4p_g64") and "shift" in layer.slots:
        formats = ("int4_g64", "int4_g64")
    elif "shift" in layer.slots:
        return f"{layout.weight} x {layout.act or 'float'} with shifted inputs"
    if formats not in _W4A4:
        return f"{layout.weight} x {layout.act or 'float'}"
    return _common_refusal(layer)


def awq_refusal(layer: Layer) -> str | None:
    """Why the W4A16 kernel cannot compute the layer, None if it can."""
    layout = layer.layout
    if layout.weight not in _W4A16 or layout.act:
        return f"{layout.weight} x {layout.act or 'float'}"
    beside = [name for name in ("smooth", "down", "shift") if name in layer.slots]
    if beside:
        return f"{layout.weight} x float with {' and '.join(beside)}, which W4A16 layers lack"
    if len(layer.shape) == 2 and (layer.shape[0] % 8 or layer.shape[1] % 64):
        return f"{layer.shape[0]} x {layer.shape[1]}: W4A16 layers have N in multiples of 8 and K of 64"
    return _common_refusal(layer)


def _common_refusal(layer: Layer) -> str | None:
    if layer.kind != "linear":
        return "a convolution"
    if layer.layout.hadamard:
        return f"a Hadamard transform of {layer.layout.hadamard}"
    return "static activation scales" if "act_scale" in layer.slots else None


def svdq_linear(layer: Layer) -> Linear:
    """A layer that `svdq_refusal` has nothing against, in natural order."""
    slots, (n, k) = layer.slots, layer.shape
    kind = "nvfp4" if layer.layout.act == "nvfp4_dynamic" else "int4"
    channel = slots["global_scale"].float().reshape(-1, 1).expand(n, 1) if kind == "nvfp4" else None
    picked = {name: slots.get(name) for name in ("smooth", "down", "up", "bias", "shift")}
    return Linear(
        kind, n, k, slots["codes"], slots["scales"], layer.dtype, act=layer.layout.act, channel=channel, **picked
    )


def awq_linear(layer: Layer) -> Linear:
    """A layer that `awq_refusal` has nothing against, with unsigned codes."""
    slots, (n, k) = layer.slots, layer.shape
    codes, zero = slots["codes"], slots.get("zero")
    if zero is None:
        codes, zero = codes ^ 0x88, slots["scales"] * -8  # two's complement to q + 8
    return Linear("awq", n, k, codes, slots["scales"], layer.dtype, zero=zero, bias=slots.get("bias"))


def write_svdq(linear: Linear, rank: int, dtype: torch.dtype) -> Written:
    """A W4A4 layer's tensors, padded by zeros to multiples of 128 and to `rank`. There is a bias if the linear has one."""
    out = Written()
    n, k = (-(-size // packing.ROWS) * packing.ROWS for size in (linear.n, linear.k))
    out.tensors["qweight"] = packing.pack_codes(_grown(linear.codes, n, k // 2))
    scales = _grown(linear.scales, n, k // linear.block)
    if linear.kind == "nvfp4":
        out.tensors["wscales"] = packing.pack_micro(scales)
        tensor, channels, error = scale_pair(linear.channel, dtype)
        out.rounded += ["tensor scale"] if error else []
        out.tensors["wtscale"] = tensor
        out.tensors["wcscales"] = packing.pack_vector(_longer(channels, n, 1.0))
    else:
        out.tensors["wscales"] = packing.pack_scales(out.cast("wscales", scales, dtype))
    if linear.bias is not None:
        out.tensors["bias"] = packing.pack_vector(_longer(out.cast("bias", linear.bias, dtype), n, 0.0))
    smooth = torch.ones(linear.k) if linear.smooth is None else linear.smooth
    out.tensors["smooth_factor"] = packing.pack_vector(_longer(out.cast("smooth", smooth, dtype), k, 1.0))
    down = torch.zeros(0, k) if linear.down is None else linear.down
    up = torch.zeros(n, 0) if linear.up is None else linear.up
    out.tensors["proj_down"] = packing.pack_down(_grown(out.cast("down", down, dtype), rank, k))
    out.tensors["proj_up"] = packing.pack_up(_grown(out.cast("up", up, dtype), n, rank))
    return out


def write_awq(linear: Linear, dtype: torch.dtype) -> Written:
    """A W4A16 layer's tensors."""
    out = Written()
    out.tensors["qweight"] = packing.pack_awq(linear.codes)
    out.tensors["wscales"] = out.cast("wscales", linear.scales, dtype).T.contiguous()
    out.tensors["wzeros"] = out.cast("wzeros", linear.zero, dtype).T.contiguous()
    if linear.bias is not None:
        out.tensors["bias"] = out.cast("bias", linear.bias, dtype)
    return out


def level(path: Path, target: Path, short: dict[str, str], rank: int, metadata: dict[str, str]) -> None:
    """Moves the file `path` to `target`; copies it if low-rank factors must get more rank, zeros. short: {name of one: its tail}."""
    if not short:
        path.rename(target)
        return
    source = open_source(path)
    with SafetensorsWriter(target, metadata) as writer:
        for name in source.shapes:
            tensor = source.read(name)
            writer.add(name, _raised(short[name], tensor, rank) if name in short else tensor)
    path.unlink()


def _raised(tail: str, t: Tensor, rank: int) -> Tensor:
    if tail == "proj_down":
        return packing.pack_down(_grown(packing.unpack_down(t), rank, t.shape[0]))
    return packing.pack_up(_grown(packing.unpack_up(t), t.shape[0], rank))


def rank_of(linear: Linear) -> int:
    """The rank that a file needs for a layer: at least one multiple of 16."""
    return max(_RANK, 0 if linear.down is None else -(-linear.down.shape[0] // _RANK) * _RANK)


def scale_pair(channel: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """(wtscale (1,), wcscales (N,), largest relative error of their product) for scales (N, 1) float32, all of `dtype`."""
    goal = channel.flatten().double()
    largest = goal.abs().max()
    steps = round(1 / torch.finfo(dtype).eps)
    tensor = (largest / (1 + torch.arange(steps, dtype=torch.float64) / steps)).to(
        dtype
    )  # one for each mantissa of wcscales
    distinct = goal.unique()
    ratios = (distinct[:, None] / tensor.double().clamp_min(torch.finfo(dtype).tiny)).to(dtype)
    error = (ratios.double() * tensor.double() / distinct[:, None].where(distinct[:, None] != 0, 1.0) - 1).abs()
    error = error.where(distinct[:, None] != 0, 0.0).nan_to_num(nan=torch.inf).amax(0)
    best = int(error.argmin())
    channels = (goal / tensor[best].double().clamp_min(torch.finfo(dtype).tiny)).to(dtype)
    return tensor[best].reshape(1), channels, float(error[best])


def _grown(t: Tensor, rows: int, columns: int) -> Tensor:
    if tuple(t.shape) == (rows, columns):
        return t
    raw = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
    return torch.nn.functional.pad(raw, (0, columns - t.shape[1], 0, rows - t.shape[0])).view(t.dtype)


def _longer(t: Tensor, size: int, value: float) -> Tensor:
    return torch.nn.functional.pad(t, (0, size - t.shape[0]), value=value)
