"""The ops: `torch.ops.qgen.linear`. Schema, shape function, dispatch by the kernel's name, gradient with respect to the input.

The name of the kernel is a literal argument: it shows in a graph dump and costs nothing at run time. Kernels may lay out codes and
scales as they like (`Kernel.pack`); the meaning of an op is its pure-torch implementation in `reference.py`.
"""

__all__ = ["SLOTS", "Slots", "linear"]

import torch
from torch import Tensor

from qgen.kernels import registry
from qgen.kernels.slots import SLOTS, Slots

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
    run, slots = registry.find("linear", name).run, Slots._make(args)
    if torch.is_autocast_enabled(x.device.type):  # a kernel chooses its own precision
        with torch.autocast(x.device.type, enabled=False):
            return own(run(x, slots))
    return own(run(x, slots))


def own(y: Tensor) -> Tensor:
    """An op's output as a tensor of its own, without a copy.

    Kernels end in a reshape, and where gradients are wanted torch lets nobody write to a view that an op made: `nn.ReLU(inplace=True)`
    after a layer would be an error. Strides stay, those of axes of size 1 too: later layers choose between layouts by them.
    """
    if not y._is_view():
        return y
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _linear_grad(dy: Tensor, *args) -> Tensor:
    from qgen.kernels import reference

    *tensors, k, weight, hadamard, name = args
    slots = Slots(*tensors, weight=weight, n=dy.shape[-1], hadamard=hadamard)
    with torch.autocast(dy.device.type, enabled=False):
        return reference.linear_grad(dy, slots, k, name)


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
