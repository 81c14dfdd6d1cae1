r"""`cpu_native_bf16`: 4-bit weights of any element and block, any activations, in bfloat16 products without a weight in memory.

    y = x̂ · Wᵀ + (x · downᵀ) · upᵀ + bias,    W = bfloat16(value(code) · step + zero),    x̂ = Q_a(((x + shift) / smooth) H)

As `cpu_native`, a panel of 64 outputs is unpacked in L2 and used for all rows, here by a table of the element's 16 values. W, x̂ and
h = x · downᵀ are rounded to bfloat16 once. Calls that this does not suit (float32 inputs, fewer than 32 rows) go to `cpu_dequant`.
"""

__all__ = []

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import linear as matmul

from qgen import formats
from qgen.kernels import cpu_compile, cpu_dequant
from qgen.kernels.cpu_native import PANEL, NativeNeeds, _Args, _fusible, _pack_up, _point, _unpack_up
from qgen.kernels.registry import Ask, Kernel, register
from qgen.kernels.slots import Slots


def linear(x: Tensor, slots: Slots) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype; codes and up in the layouts of `pack`, the rest canonical."""
    return _multiply(x, _quantize(x, slots), slots)


def _quantize(x: Tensor, slots: Slots) -> Tensor:
    """x̂ (M, Kp): the half of `linear` that layers with a common input may share."""
    xh = cpu_dequant.quantize(x, slots)
    return xh.to(torch.bfloat16).contiguous() if _suits(x) else xh


def _suits(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.numel() >= 32 * x.shape[-1]


def _multiply(x: Tensor, xh: Tensor, slots: Slots) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    n, down, bias = slots.n, slots.down, slots.bias
    fused = down is None or _fusible(down)
    if not (_suits(x) and fused):
        up = _unpack_up(slots.up, n) if down is not None and fused else slots.up
        return cpu_dequant.multiply(x, xh, slots._replace(codes=_unpack_codes(slots.codes, n), up=up))
    kp, fmt = slots.codes.shape[-1] * 2, formats.get(slots.weight)
    tensors = {
        "x": xh,
        "weight": slots.codes,
        "up": slots.up,
        "hidden": None if down is None else matmul(rows, down),
        "bias": None if bias is None else bias.to(torch.bfloat16),
        "y": rows.new_empty(len(rows), n),
    }
    args = _Args()
    _point(args, tensors)
    args.m, args.kp, args.n, args.r = len(rows), kp, n, 0 if down is None else len(down)
    args.block, args.threads = fmt.block or kp, torch.get_num_threads()
    table = fmt.element.decode(torch.arange(16, dtype=torch.uint8), torch.float32)
    step = _panels(fmt.step(slots.scales, slots.global_scale))
    zeros = None if slots.zero is None else _panels(slots.zero.float())
    pointers = (table.data_ptr(), step.data_ptr(), None if zeros is None else zeros.data_ptr())
    cpu_compile.library().qgen_multiply_bf16(ctypes.byref(args), *map(ctypes.c_void_p, pointers))
    return tensors["y"].reshape(*x.shape[:-1], n)


def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Codes (N, Kp/2) to (P, Kp/8, 64, 4) bytes, rows padded to whole panels, and `up` as `cpu_native` has it."""
    slots = dict(slots)
    codes = torch.nn.functional.pad(slots["codes"], (0, 0, 0, -ask.n % PANEL))
    slots["codes"] = codes.view(-1, PANEL, codes.shape[1] // 4, 4).transpose(1, 2).reshape(codes.shape)
    if "down" in slots and _fusible(slots["down"]):
        slots["up"] = _pack_up(slots["up"])
    return slots


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    slots = dict(slots, codes=_unpack_codes(slots["codes"], ask.n))
    if "down" in slots and _fusible(slots["down"]):
        slots["up"] = _unpack_up(slots["up"], ask.n)
    return slots


def _unpack_codes(codes: Tensor, n: int) -> Tensor:
    return codes.view(-1, codes.shape[1] // 4, PANEL, 4).transpose(1, 2).reshape(codes.shape)[:n]


def _panels(t: Tensor) -> Tensor:
    """(N, G) float32 to (P, G, 64)."""
    return (
        torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % PANEL))
        .view(-1, PANEL, t.shape[1])
        .transpose(1, 2)
        .contiguous()
    )


def _served() -> tuple[str, ...]:
    """4-bit formats whose scales change along K at least every 128 columns: see `cpu_dequant._product`."""
    able = []
    for name, fmt in formats.formats.items():
        if fmt.plain and fmt.bits == 4 and 8 <= (fmt.block or 256) <= 128:
            able.append(name)
    return tuple(able)


_needs = NativeNeeds(
    devices=("cpu",),
    weights=_served(),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    k_multiple=8,
)
register(Kernel("linear", "cpu_native_bf16", _needs, linear, 30, pack, unpack, _quantize, _multiply))
