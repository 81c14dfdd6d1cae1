"""Triton's interpreter, made to compute what the GPU computes, for tests only.

With `TRITON_INTERPRET=1` set before Triton is imported, kernels run in numpy on the CPU. In Triton 3.8 that run is
silently wrong for bfloat16 (values are handled as their bit patterns, casts truncate), for casts to 8-bit floats (no
carry, no saturation, wrong subnormals), for e4m3 scales of `dot_scaled` (decoded as e8m0), and it has no inline
assembly. `install` replaces those operations by torch's, leaves the others alone, and speeds up integer dots (float
BLAS, exact below 2**24).

Inline assembly runs as a numpy function that the test registers for the exact text: `register_asm(text, function)`.
Equality of that model with the machine is what the kernel's plain-op twin and the compiled code are for.

A test module calls `needed()` at its top: it installs the corrections, or skips the module where the interpreter is
off. `test_interpreted.py` runs each such module in a process of its own, so that compiled and interpreted kernels
never share one.
"""

__all__ = ["install", "interpreting", "launches", "needed", "on_cpu", "register_asm"]

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

_models: dict[str, Callable] = {}


def interpreting() -> bool:
    """Whether this process was started with TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needed() -> None:
    """Installs the corrections; skips the calling test module, with the reason, where the interpreter is off."""
    pytest.importorskip("triton", reason="kernels are written in Triton, which is not installed")
    if not interpreting():
        pytest.skip(
            "runs interpreted, in a process of its own: test_interpreted.py starts it, or set TRITON_INTERPRET=1",
            allow_module_level=True,
        )
    install()


def e2m1_model(low, high):
    """Numpy model of `cvt.rn.satfinite.e2m1x2.f32`: two floats to one byte, by the format's own encoder."""
    from qgen.formats.fp4 import E2M1

    low, high = (E2M1.encode(torch.from_numpy(np.ascontiguousarray(x))) for x in (low, high))
    return ((low | high << 4).numpy(),)


def register_asm(text, model: Callable) -> None:
    """`model` stands for the inline assembly `text` (a string or tl.constexpr): arrays in, tuple of arrays out,
    element by element.

    bfloat16 travels as uint16, 8-bit floats as uint8.
    """
    _models[_normal(getattr(text, "value", text))] = model


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Within the block, the returned list collects the name of each kernel that is launched."""
    from triton.runtime import interpreter

    names: list[str] = []
    original = interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    try:
        yield names
    finally:
        interpreter.GridExecutor.__call__ = original


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block every Triton kernel offers itself to the CPU, ahead of all others; what else it needs, it still needs."""
    from qgen.kernels.registry import kernels

    before = dict(kernels.items())
    for name, kernel in before.items():
        if kernel.name.startswith("triton_"):
            needs = replace(kernel.needs, devices=tuple({*kernel.needs.devices, "cpu"}))
            kernels._items[name] = replace(kernel, needs=needs, priority=1000 + kernel.priority)
    try:
        yield
    finally:
        kernels._items.update(before)


def install() -> None:
    """Puts the corrections into Triton's interpreter; a second call changes nothing."""
    from triton.runtime import interpreter

    if getattr(interpreter, "qgen_corrected", False):
        return
    _correct(interpreter)
    interpreter.qgen_corrected = True


def _normal(text: str) -> str:
    return " ".join(text.split())


def _correct(interpreter) -> None:
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock = {
        name: getattr(builder, name)
        for name in ("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op", "ternary_op", "create_fma")
    }
    floats = {
        tl.float64: torch.float64,
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    raw = {
        tl.bfloat16: np.uint16,
        tl.float8e4nv: np.uint8,
        tl.float8e5: np.uint8,
    }  # how numpy carries what it has no type for
    saturating = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}  # PTX cvt.rn.satfinite

    def to_torch(h):
        kind, data = h.dtype.scalar, np.ascontiguousarray(h.data)
        return torch.from_numpy(data.view(np.int16) if kind == tl.bfloat16 else data).view(floats[kind])

    def from_torch(t, kind):
        t = t.contiguous()
        if kind in raw:
            return handle(t.view(torch.int16 if kind == tl.bfloat16 else torch.uint8).numpy().view(raw[kind]), kind)
        return handle(t.numpy(), kind)

    def is_bf16(h):
        return h.dtype.scalar == tl.bfloat16

    def as_f32(h):
        return to_torch(h).float().numpy()

    def as_bf16(array):
        # asarray: reductions of 0-d arrays give numpy scalars
        return from_torch(torch.from_numpy(np.array(array, dtype=np.float32)).to(torch.bfloat16), tl.bfloat16)

    def cast(h, kind):
        t = to_torch(h)
        if kind in saturating:
            t = t.float().clamp(-saturating[kind], saturating[kind])
        return from_torch(t.to(floats[kind]), kind)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        special = source in raw or target in raw
        if special and source in floats and target in floats:
            return cast(src, target)
        if source.is_int() and target in raw:
            return cast(handle(src.data.astype(np.float32), tl.float32), target)
        if source in raw and target.is_int():
            return handle(as_f32(src).astype(interpreter._get_np_dtype(target)), target)
        return stock["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        if source in floats and target in floats and rounding in (None, ir.ROUNDING_MODE.RTNE):
            return cast(src, target)
        return stock["create_fp_to_fp"](self, src, dst_type, rounding)

    def create_dot(self, a, b, d, precision, imprecise):
        kind = a.dtype.scalar
        if kind in raw:
            return handle(np.matmul(as_f32(a), as_f32(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)
        if kind == tl.int8:
            exact = np.float32 if a.data.shape[-1] * 128 * 128 < 2**24 else np.float64
            product = np.matmul(a.data.astype(exact), b.data.astype(exact))
            return handle(product.astype(np.int32) + d.data, d.dtype.scalar)
        return stock["create_dot"](self, a, b, d, precision, imprecise)

    def scaled_operand(value, scale, kind, packed_along_k, right):
        if scale is None or scale.dtype.scalar != tl.float8e4nv:
            return interpreter._prepare_dot_scaled_operand(value, scale, kind, packed_along_k, is_rhs=right)
        x = interpreter._prepare_dot_scaled_operand(value, None, kind, packed_along_k, is_rhs=right)
        s = as_f32(scale)
        s = np.repeat(s, x.shape[-2 if right else -1] // s.shape[-1], axis=-1)
        return x * (np.swapaxes(s, -1, -2) if right else s)

    def create_dot_scaled(self, lhs, ls, lf, rhs, rs, rf, fast_math, l_packed, r_packed, acc):
        left, right = scaled_operand(lhs, ls, lf, l_packed, False), scaled_operand(rhs, rs, rf, r_packed, True)
        return handle(np.matmul(left, right) + acc.data, tl.float32)

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) and is_bf16(rhs):
            out = op(as_f32(lhs), as_f32(rhs))
            return handle(out, tl.int1) if out.dtype == np.bool_ else as_bf16(out)
        return stock["binary_op"](self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return as_bf16(op(as_f32(arg))) if is_bf16(arg) else stock["unary_op"](self, arg, op)

    def ternary_op(self, lhs, rhs, other, op):
        if is_bf16(lhs) and op is np.clip:
            return as_bf16(op(as_f32(lhs), as_f32(rhs), as_f32(other)))
        return stock["ternary_op"](self, lhs, rhs, other, op)

    def create_fma(self, x, y, z):
        if is_bf16(z):
            return as_bf16(as_f32(x) * as_f32(y) + as_f32(z))  # a bfloat16 product is exact in float32
        if z.dtype.scalar == tl.float32:  # one rounding, as the instruction has
            exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
            return handle(exact.astype(np.float32), tl.float32)
        return stock["create_fma"](self, x, y, z)

    class Results:
        def __init__(self, handles):
            self.handles = handles

        def get_result(self, index):
            return self.handles[index]

    def create_inline_asm(self, text, constraints, values, types, pure, pack):
        model = _models.get(_normal(text))
        if model is None:
            raise NotImplementedError(f"no numpy model is registered for this assembly: {text}")
        outs = model(*[v.data for v in values])
        kinds = [t.scalar for t in types]
        for out, kind in zip(outs, kinds, strict=True):
            assert out.dtype == interpreter._get_np_dtype(kind), f"the model of {text} gave {out.dtype} for {kind}"
        return Results([handle(np.ascontiguousarray(o), kind) for o, kind in zip(outs, kinds, strict=True)])

    reduce_stock = interpreter.ReduceOps.apply_impl

    def reduce_impl(self, inputs):
        """Reductions of bfloat16 in float32, rounded once at the end."""
        if not any(is_bf16(t.handle) for t in inputs):
            return reduce_stock(self, inputs)
        wide = [
            tl.core.tensor(handle(as_f32(t.handle), tl.float32), tl.block_type(tl.float32, t.shape)) for t in inputs
        ]
        outs = reduce_stock(self, wide)
        many = isinstance(outs, (tuple, list))

        def narrow(t):
            if t.dtype != tl.float32:
                return t
            shape = [int(n) for n in getattr(t, "shape", ())]
            return tl.core.tensor(as_bf16(t.handle.data), tl.block_type(tl.bfloat16, shape) if shape else tl.bfloat16)

        return [narrow(t) for t in outs] if many else narrow(outs)

    interpreter.ReduceOps.apply_impl = reduce_impl
    for name, function in {
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
        "create_dot_scaled": create_dot_scaled,
        "binary_op": binary_op,
        "unary_op": unary_op,
        "ternary_op": ternary_op,
        "create_fma": create_fma,
        "create_inline_asm": create_inline_asm,
        "get_bf16": lambda self, value: as_bf16([value]),
    }.items():
        setattr(builder, name, function)
    # Stock versions of these are lambdas; they look cast_impl up at call time, which the assignment above has replaced.
    for name in (
        "create_si_to_fp",
        "create_ui_to_fp",
        "create_fp_to_si",
        "create_fp_to_ui",
        "create_fp_ext",
        "create_fp_trunc",
    ):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
