r"""`cpu_native`: W4A8 and W8A8 in one pass over the activations and one over the weights, on processors with AVX-512 VNNI and BF16.

    y = (q_x · q_wᵀ) · step_x · step_w + (x · downᵀ) · upᵀ + bias,    q_w = code · subscale, an int8

Weights stay at 4 bits; a panel of 64 outputs is unpacked to int8 in L2 and used for all rows, so nothing unpacked outlives the call.
Products are exact integers; only h = x · downᵀ is rounded to bfloat16 when x is. Results do not depend on the number of threads. The code
is compiled at first use by the user's compiler (`cpu_compile.py`); without one, `auto` falls through to `cpu_int8`.
"""

__all__ = ["quantize"]

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from qgen import formats
from qgen.kernels import cpu_compile
from qgen.kernels.registry import Ask, Kernel, Needs, register
from qgen.kernels.slots import Slots

INT4 = ("int4_s8_g32", "int4_s8_g64", "int4_s8_g128")
PANEL = 64  # outputs that are unpacked together
_BYTES = (
    "x",
    "weight",
    "sub",
    "down",
    "up",
    "bias",
    "smooth",
    "shift",
    "step_w",
    "act_step",
    "codes",
    "step_x",
    "hidden",
    "y",
)
_SIZES = ("m", "k", "kp", "n", "r", "block", "shift_n")


class _Args(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _BYTES),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("threads", ctypes.c_int),
    )


@dataclass(frozen=True)
class NativeNeeds(Needs):
    """Needs that end with: a processor with the instructions, and a compiler."""

    def refusals(self, ask: Ask) -> list[str]:
        why = super().refusals(ask)
        if not why and (reason := cpu_compile.unavailable()):
            why.append(reason)
        return why


def linear(x: Tensor, slots: Slots) -> Tensor:
    """x (…, K) to y (…, N) in x's dtype; codes, scales, down and up in the layouts of `pack`."""
    down, bf16 = slots.down, _all_bf16(x, slots)
    rows = _rows(x, bf16)
    tensors, args = _phase_one(
        rows, _columns(slots), slots.smooth, down if bf16 else None, slots.shift, slots.act_scale
    )
    return _product(x, rows, tensors, args, slots)


def _quantize(x: Tensor, slots: Slots) -> dict[str, Tensor | None]:
    """Codes and steps of x: the half of `linear` that layers with a common input may share."""
    rows = _rows(x, _all_bf16(x, slots))
    tensors, args = _phase_one(rows, _columns(slots), slots.smooth, None, slots.shift, slots.act_scale)
    cpu_compile.library().qgen_quantize(ctypes.byref(args), int(rows.dtype == torch.bfloat16))
    return {name: tensors[name] for name in ("codes", "step_x")}


def _multiply(x: Tensor, made: dict[str, Tensor | None], slots: Slots) -> Tensor:
    """The other half: y of x and its codes."""
    bf16 = _all_bf16(x, slots)
    rows = _rows(x, bf16)
    hidden = torch.nn.functional.linear(rows, _unpack_down(slots.down)) if bf16 and slots.down is not None else None
    tensors, args = {**made, "x": None, "hidden": hidden}, _Args()
    _point(args, tensors)
    args.m, args.k, args.kp, args.r = *rows.shape, _columns(slots), 0 if hidden is None else hidden.shape[1]
    args.threads = torch.get_num_threads()
    return _product(x, rows, tensors, args, slots)


def _all_bf16(x: Tensor, slots: Slots) -> bool:
    """Whether the low-rank branch joins the kernel, in bfloat16."""
    parts = (x, slots.smooth, slots.shift, slots.bias, slots.down)
    return (slots.down is None or _fusible(slots.down)) and all(t is None or t.dtype == torch.bfloat16 for t in parts)


def _rows(x: Tensor, bf16: bool) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(torch.bfloat16 if bf16 else torch.float32).contiguous()


def _columns(slots: Slots) -> int:
    """Kp of packed codes."""
    return slots.codes.numel() // len(slots.codes) * (2 if slots.weight in INT4 else 1)


def _product(x: Tensor, rows: Tensor, tensors: dict[str, Tensor | None], args: "_Args", slots: Slots) -> Tensor:
    codes, scales, global_scale, _, _, down, up, bias, _, _, weight_format, _, n, _ = slots
    bf16, int4 = _all_bf16(x, slots), weight_format in INT4
    kp, dtype = _columns(slots), rows.dtype
    y = rows.new_empty(len(rows), n)
    tensors |= {"y": y, "weight": codes, "sub": scales if int4 else None, "step_w": global_scale if int4 else scales}
    tensors |= {"up": up if bf16 else None, "bias": None if bias is None else bias.to(dtype)}
    _point(args, tensors)
    args.n, args.block = n, formats.get(weight_format).block or kp
    cpu_compile.library().qgen_linear(ctypes.byref(args), int(bf16), int(int4))
    if down is not None and not bf16:
        if _fusible(down):
            down, up = _unpack_down(down), _unpack_up(up, n)
        y.addmm_(rows @ down.float().T, up.float().T)
    return y.to(x.dtype).reshape(*x.shape[:-1], n)


def quantize(
    x: Tensor,
    smooth: Tensor | None = None,
    shift: Tensor | None = None,
    act_scale: Tensor | None = None,
    kp: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (M, Kp) int8 and steps (M, 1) float32 of x (M, K) bfloat16 or float32: `reference.quantize_act`, bit for bit."""
    x = x.contiguous() if x.dtype == torch.bfloat16 else x.float().contiguous()
    tensors, args = _phase_one(x, kp or x.shape[1], smooth, None, shift, act_scale)
    cpu_compile.library().qgen_quantize(ctypes.byref(args), int(x.dtype == torch.bfloat16))
    return tensors["codes"].bitwise_xor(0x80).view(torch.int8), tensors["step_x"][:, None]


def _phase_one(
    rows: Tensor, kp: int, smooth: Tensor | None, down: Tensor | None, shift: Tensor | None, act_scale: Tensor | None
) -> tuple[dict[str, Tensor | None], _Args]:
    m, k = rows.shape
    tensors = {
        "x": rows,
        "down": down,
        "smooth": None if smooth is None else smooth.to(rows.dtype),
        "shift": None if shift is None else shift.to(rows.dtype).contiguous(),
        "act_step": None if act_scale is None else act_scale.float(),
        "codes": torch.empty(m, kp, dtype=torch.uint8),
        "step_x": torch.empty(m, dtype=torch.float32),
        "hidden": None if down is None else rows.new_empty(m, len(down)),
    }
    args = _Args()
    _point(args, tensors)
    args.m, args.k, args.kp, args.r = m, k, kp, 0 if down is None else len(down)
    args.shift_n = 0 if shift is None else shift.numel()
    args.threads = torch.get_num_threads()
    return tensors, args


def _point(args: _Args, tensors: dict[str, Tensor | None]) -> None:
    for name, t in tensors.items():
        setattr(args, name, None if t is None else t.data_ptr())


# -- layouts: permutations of bytes, rows padded to whole panels ------------------------------------------------------------
def pack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """Canonical tensors to the layouts that `cpu_native_source` describes."""
    slots = dict(slots)
    for name in ("codes", "scales", "global_scale"):
        if name in slots:
            slots[name] = torch.nn.functional.pad(slots[name], (0, 0, 0, -ask.n % PANEL))
    shape = slots["codes"].shape
    if ask.weight in INT4:  # (P, j, i, Kp/8, half, pair) -> (P, Kp/8, j, i, pair, half)
        slots["codes"] = slots["codes"].view(-1, 4, 16, shape[1] // 4, 2, 2).permute(0, 3, 1, 2, 5, 4).reshape(shape)
        slots["scales"] = (
            slots["scales"].view(-1, PANEL, slots["scales"].shape[1]).transpose(1, 2).reshape(slots["scales"].shape)
        )
    else:  # (P, j, i, Kp/4, 4) -> (P, Kp/4, j, i, 4)
        slots["codes"] = slots["codes"].view(-1, 4, 16, shape[1] // 4, 4).permute(0, 3, 1, 2, 4).reshape(shape)
    if "down" in slots and _fusible(slots["down"]):
        r, k = slots["down"].shape
        slots["down"] = slots["down"].view(r, k // 2, 2).transpose(0, 1).reshape(r, k)
        slots["up"] = _pack_up(slots["up"])
    return slots


def unpack(slots: dict[str, Tensor], ask: Ask) -> dict[str, Tensor]:
    """The exact inverse of `pack`."""
    slots = dict(slots)
    shape = slots["codes"].shape
    if ask.weight in INT4:
        slots["codes"] = slots["codes"].view(-1, shape[1] // 4, 4, 16, 2, 2).permute(0, 2, 3, 1, 5, 4).reshape(shape)
        slots["scales"] = (
            slots["scales"].view(-1, slots["scales"].shape[1], PANEL).transpose(1, 2).reshape(slots["scales"].shape)
        )
    else:
        slots["codes"] = slots["codes"].view(-1, shape[1] // 4, 4, 16, 4).permute(0, 2, 3, 1, 4).reshape(shape)
    for name in ("codes", "scales", "global_scale"):
        if name in slots:
            slots[name] = slots[name][: ask.n]
    if "down" in slots and _fusible(slots["down"]):
        slots["down"], slots["up"] = _unpack_down(slots["down"]), _unpack_up(slots["up"], ask.n)
    return slots


def _fusible(down: Tensor) -> bool:
    return down.dtype == torch.bfloat16 and down.shape[0] % 16 == 0


def _unpack_down(down: Tensor) -> Tensor:
    r, k = down.shape
    return down.view(k // 2, r, 2).transpose(0, 1).reshape(r, k)


def _pack_up(up: Tensor) -> Tensor:
    """(N, R) to (P, R/2, 64, 2), rows padded to whole panels."""
    up = torch.nn.functional.pad(up, (0, 0, 0, -up.shape[0] % PANEL))
    r = up.shape[1]
    return up.view(-1, PANEL, r // 2, 2).transpose(1, 2).reshape(-1, r)


def _unpack_up(up: Tensor, n: int) -> Tensor:
    r = up.shape[1]
    return up.view(-1, r // 2, PANEL, 2).transpose(1, 2).reshape(-1, r)[:n]


_needs = NativeNeeds(
    devices=("cpu",),
    weights=(*INT4, "int8_row"),
    acts=("int8_row",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    k_multiple=8,
    refuses=frozenset({"hadamard"}),
)
register(Kernel("linear", "cpu_native", _needs, linear, 40, pack, unpack, _quantize, _multiply))
