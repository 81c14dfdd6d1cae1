"""Layers whose tensors accelerate keeps elsewhere: sequential CPU offload, disk offload, a device map that spills.

accelerate takes a model's `state_dict`, puts every parameter on the meta device, and before each call of a layer writes the tensors of that
dictionary into the layer's parameters. What it writes is canonical; a layer's memory is packed for one kernel. So an offloaded layer keeps
no kernel: while it runs it packs what it was given, and afterwards it lets go of it. A layer that was only moved is packed for the device
where it is. Group offload (diffusers) moves the memory as it is and needs none of this.
"""

__all__ = ["borrowed", "hooked"]

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from qgen.nn.packed import Packed


def hooked(layer: "Packed", hook: Any) -> None:
    """What a packed layer does once accelerate has put a hook on it."""
    if layer.kernel is None:
        return
    if layer.codes.device.type != "meta":
        if layer.ask() != layer._ask:
            layer.prepare(layer.serves(layer.kernel))
        return
    kept = next(h.weights_map for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False))
    if type(kept) is dict:  # made of the layer's own memory, and not of a state dict
        kept.update(layer._around(layer.found(layer.kernel).unpack, {slot: kept[slot] for slot in layer.slots()}))
    layer.fill({slot: torch.empty_like(kept[slot], device="meta") for slot in layer.slots()})
    layer.lent = True


@contextlib.contextmanager
def borrowed(layer: "Packed") -> Iterator[None]:
    """Within the block the layer has a kernel and is packed for it. One that is offloaded no more stays so."""
    before = dict(layer._parameters)
    layer.prepare()
    if "_hf_hook" not in layer.__dict__:
        layer.lent = False
    try:
        yield
    finally:
        if layer.lent:
            layer._parameters.update(before)
            layer.kernel, layer._ask = None, None
