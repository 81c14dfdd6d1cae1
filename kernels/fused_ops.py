"""The fused ops, `torch.ops.qgen.fused_linear` and `torch.ops.qgen.mlp`: schemas, shape functions, dispatch by name.

`fused_linear` is a linear layer with what comes before and behind it, two launches; `mlp` is two layers with an
activation between, three. Schemas are flat, as `torch.library` wants them; `fused_linear(x, slots, …)` and `mlp(x, first,
second, …)` take records. There is no gradient: training runs the layers one by one.
"""

__all__ = ["fused_linear", "mlp"]

import torch
from torch import Tensor

from qgen.errors import unknown
from qgen.kernels import registry
from qgen.kernels.fusion import ACTIVATIONS, GATED, Heads, Producer
from qgen.kernels.slots import SLOTS, Slots

_PRODUCER = "str producer, Tensor? gamma, Tensor? beta, Tensor? scale, Tensor? mod_shift, Tensor? gate, float eps"
_HEADS = "int head_dim, int head_columns, Tensor? head_gamma, Tensor? cos, Tensor? sin, bool halves, float head_eps"


def _slots(suffix: str = "") -> str:
    """A layer's part of a schema, in the order of `Slots`."""
    tensors = [f"Tensor{'' if slot in ('codes', 'scales') else '?'} {slot}{suffix}" for slot in SLOTS]
    rest = (f"str weight{suffix}", f"str act{suffix}", f"int n{suffix}", f"int hadamard{suffix}")
    return ", ".join((*tensors, *rest))


_library = torch.library.Library("qgen", "FRAGMENT")
_library.define(f"fused_linear(Tensor x, {_slots()}, {_PRODUCER}, str activation, {_HEADS}, str kernel) -> Tensor")
_library.define(f"mlp(Tensor x, {_slots()}, {_slots('2')}, {_PRODUCER}, str activation, str kernel) -> Tensor")


def fused_linear(
    x: Tensor,
    slots: Slots,
    producer: Producer | None = None,
    activation: str = "none",
    heads: Heads | None = None,
    kernel: str = "reference",
) -> Tensor:
    """heads(activation(linear(produce(x)))): x (…, K) to (…, N) in x's dtype. slots: as `kernel` lays them out.

    ValueError for an activation or a kernel that there is not, or heads that the layer's outputs are too few for.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, ACTIVATIONS))
    if heads is not None and heads.columns > slots.n:
        raise ValueError(f"heads cover {heads.columns} columns, the layer has {slots.n} outputs")
    behind = _flat_heads(heads or Heads(2, 0))
    return torch.ops.qgen.fused_linear(x, *slots, *_flat_producer(producer or Producer()), activation, *behind, kernel)


def mlp(
    x: Tensor,
    first: Slots,
    second: Slots,
    producer: Producer | None = None,
    activation: str = "gelu_tanh",
    kernel: str = "reference",
) -> Tensor:
    """second(activation(first(produce(x)))): x (…, K) to (…, N2) in x's dtype; "silu_mul": first gives [gate | value].

    ValueError for an activation or a kernel that there is not.
    """
    if activation not in (*ACTIVATIONS, GATED):
        raise ValueError(unknown("activation", activation, (*ACTIVATIONS, GATED)))
    if activation == GATED and first.n % 2:
        raise ValueError(f"a gated MLP needs an even number of first outputs, found {first.n}")
    flat = _flat_producer(producer or Producer())
    return torch.ops.qgen.mlp(x, *first, *second, *flat, activation, kernel)


def _flat_producer(p: Producer) -> tuple:
    return (p.kind, p.gamma, p.beta, p.scale, p.shift, p.gate, p.eps)


def _flat_heads(h: Heads) -> tuple:
    return (h.dim, h.columns, h.gamma, h.cos, h.sin, h.halves, h.eps)


_LAYER, _BEFORE = len(Slots._fields), 7


def _fused_linear(x: Tensor, *args) -> Tensor:
    slots, args = Slots._make(args[:_LAYER]), args[_LAYER:]
    before, activation, behind, kernel = args[:_BEFORE], args[_BEFORE], args[_BEFORE + 1 : -1], args[-1]
    run = registry.find("fused_linear", kernel).run
    with torch.autocast(x.device.type, enabled=False):
        return run(x, slots, Producer(*before), activation, Heads(*behind) if behind[1] else None)


def _mlp(x: Tensor, *args) -> Tensor:
    first, second, args = Slots._make(args[:_LAYER]), Slots._make(args[_LAYER : 2 * _LAYER]), args[2 * _LAYER :]
    run = registry.find("mlp", args[-1]).run
    with torch.autocast(x.device.type, enabled=False):
        return run(x, first, second, Producer(*args[:_BEFORE]), args[_BEFORE])


_library.impl("fused_linear", _fused_linear, "CompositeExplicitAutograd")
_library.impl("mlp", _mlp, "CompositeExplicitAutograd")


@torch.library.register_fake("qgen::fused_linear")
def _(x, *args):
    return x.new_empty((*x.shape[:-1], args[Slots._fields.index("n")]))


@torch.library.register_fake("qgen::mlp")
def _(x, *args):
    return x.new_empty((*x.shape[:-1], args[_LAYER + Slots._fields.index("n")]))
