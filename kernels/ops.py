"""The ops: `torch.ops.qgen.linear`. Schema, shape function, dispatch by the kernel's name, gradient with respect to the input.

The name of the kernel is a literal argument: it shows in a graph dump and costs nothing at run time. Kernels may lay out codes and
scales as they like (`Kernel.pack`); the meaning of an op is its pure-torch implementation in `reference.py`.
"""

__all__ = ["SLOTS", "linear"]

import torch
from torch import Tensor

from qgen.kernels import registry

# Tensors of a quantized linear layer, in the order of the schema. Shapes in canonical layout; Kp = K padded to the format's block.
SLOTS = (
    "codes",  # (N, Kp * bits / 8) uint8
    "scales",  # (N, Kp / block)
    "global_scale",  # () or (N, 1) float32, or None
    "zero",  # (N, Kp / block), or None
    "smooth",  # (K,), the input is divided by it, or None
    "down",  # (R, K), acts on the raw input, or None
    "up",  # (N, R), or None
    "bias",  # (N,), or None
    "shift",  # () or (K,), added to the raw input before smoothing, not seen by `down`, or None
    "act_scale",  # () or (Kp / block,) float32 static activation scales, or None = dynamic
)

_library = torch.library.Library("qgen", "DEF")
_library.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? global_scale, Tensor? zero, Tensor? smooth, Tensor? down, "
    "Tensor? up, Tensor? bias, Tensor? shift, Tensor? act_scale, str weight, str act, int n, int hadamard, str kernel) -> Tensor"
)
_library.define(
    "linear_grad(Tensor dy, Tensor codes, Tensor scales, Tensor? global_scale, Tensor? zero, Tensor? smooth, Tensor? down, "
    "Tensor? up, int k, str weight, int hadamard, str kernel) -> Tensor"
)


def _linear(x: Tensor, *args, kernel: str | None = None) -> Tensor:
    *args, name = args if kernel is None else (*args, kernel)
    run = registry.find("linear", name).run
    if torch.is_autocast_enabled(x.device.type):  # a kernel chooses its own precision
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *args)
    return run(x, *args)


def _linear_grad(dy: Tensor, *args) -> Tensor:
    from qgen.kernels import reference

    *args, name = args
    with torch.autocast(dy.device.type, enabled=False):
        return reference.linear_grad(dy, *args, name)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("linear_grad", _linear_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("qgen::linear")
def _(x, codes, scales, global_scale, zero, smooth, down, up, bias, shift, act_scale, weight, act, n, hadamard, kernel):
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("qgen::linear_grad")
def _(dy, codes, scales, global_scale, zero, smooth, down, up, k, weight, hadamard, kernel):
    return dy.new_empty((*dy.shape[:-1], k))


def _setup(ctx, inputs, output):
    x, codes, scales, global_scale, zero, smooth, down, up, _, _, _, weight, _, _, hadamard, kernel = inputs
    ctx.save_for_backward(codes, scales, global_scale, zero, smooth, down, up)
    ctx.rest = (x.shape[-1], weight, hadamard, kernel)


def _backward(ctx, dy):
    dx = torch.ops.qgen.linear_grad(dy, *ctx.saved_tensors, *ctx.rest)
    return (dx, *[None] * 15)


torch.library.register_autograd("qgen::linear", _backward, setup_context=_setup)

linear = torch.ops.qgen.linear
