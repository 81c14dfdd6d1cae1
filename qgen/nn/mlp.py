r"""Two layers with a GELU between as one op of three launches, where a model calls them one by one.

    B(gelu(A(x)))        A gives a promise, gelu(promise) is another one, B keeps it: `torch.ops.qgen.mlp` of x, A, B

A pair is a module that holds two packed layers, the second as wide as the first gives, and something whose `approximate` is "tanh", as
`nn.GELU` and diffusers' have. What its code does with them is not looked at. A gives a `Pending` tensor: shape, dtype and device of its
output, x, and no values. GELU (tanh) passes it on, so does dropout at rest, and a layer B whose kernel has the fused op takes x, A and
itself there. Whatever else is done with it, be it adding a LoRA's product, a hook that looks, or another activation, gets the values of
A as if nothing had happened; A then never defers again until it is prepared anew.

It is asked for by `qgen.prepare(model, fuse_mlp=True)`: the activation then reads A's float32 sum, where the model's own GELU reads it
rounded, so that pictures differ in the last bits. Nothing is deferred while a gradient is wanted (the op has none), while a graph is
compiled, nor by layers that accelerate lends their weights for one call. Layers with tables over timesteps or stored activation scales
run one by one.
"""

__all__ = ["Pending", "able", "deferred", "joined", "mark"]

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qgen.kernels import fused_ops, registry
from qgen.nn.packed import Packed

GELU = "gelu_tanh"


class Pending(Tensor):
    """The output of `first` for x, or GELU of it, not computed yet. Any operation but that GELU computes it."""

    x: Tensor
    first: Packed
    activation: str

    @staticmethod
    def __new__(cls, x: Tensor, first: Packed, activation: str = "none"):
        made = Tensor._make_wrapper_subclass(cls, (*x.shape[:-1], first.n), dtype=x.dtype, device=x.device)  # type: ignore[attr-defined]
        made.x, made.first, made.activation = x, first, activation
        return made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"Pending({tuple(self.shape)}, {self.activation})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.gelu.default and kwargs.get("approximate") == "tanh" and args[0].activation == "none":
            return cls(args[0].x, args[0].first, GELU)
        if (
            func is torch.ops.aten.dropout.default and not args[2]
        ):  # seen in inference mode alone; else it returns its input
            return args[0]
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)

    def values(self) -> Tensor:
        """What it stands for; its layer does not defer any more."""
        self.first.defers = False
        y = self.first(self.x)
        return F.gelu(y, approximate="tanh") if self.activation == GELU else y


def mark(module: nn.Module, on: bool) -> int:
    """Lets the first layer of every pair in a prepared model defer, or with `on` false no layer at all; how many there are."""
    for layer in module.modules():
        if isinstance(layer, Packed):
            layer.defers = False
    found = [pair for owner in module.modules() if on and (pair := _pair(owner))]
    for first, _ in found:
        first.defers = True
    return len({id(first) for first, _ in found})


def _pair(owner: nn.Module) -> tuple[Packed, Packed] | None:
    inside = list(owner.modules())
    layers = [m for m in inside if isinstance(m, Packed)]
    if len(layers) != 2 or not all(isinstance(layer, nn.Linear) and able(layer) for layer in layers):
        return None
    first, second = layers
    if first.n != second.k or not any(getattr(m, "approximate", None) == "tanh" for m in inside):
        return None
    return first, second


def able(layer: Packed) -> bool:
    """Whether a packed, prepared layer can be one of the two."""
    kernel = layer.kernel
    return kernel is not None and not layer.timed and layer.known_x is None and _serves(kernel, layer.ask())


@functools.lru_cache(maxsize=1024)
def _serves(kernel: str, ask: registry.Ask) -> bool:
    """Whether the fused op has a kernel of the name that takes such a layer."""
    if not ask.act or f"mlp/{kernel}" not in registry.kernels:
        return False
    return not registry.find("mlp", kernel).needs.refusals(replace(ask, op="mlp"))


def deferred(layer: Packed, x: Tensor) -> bool:
    """Whether a layer that may defer does so for x."""
    if torch.compiler.is_compiling() or layer.lent or not x.is_floating_point() or x.shape[-1] != layer.k:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return not torch.is_grad_enabled() or not (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


def joined(second: Packed, pending: Pending) -> Tensor:
    """The output of `second` for what is pending, by the fused op if both layers have one kernel that serves it."""
    first = pending.first
    fits = pending.activation == GELU and first.kernel == second.kernel and first.n == second.k and able(second)
    if not fits or first.codes.device != pending.x.device:  # offloaded when it had been called
        return second(pending.values())
    return fused_ops.mlp(pending.x, first.record(), second.record(), activation=pending.activation, kernel=first.kernel)
