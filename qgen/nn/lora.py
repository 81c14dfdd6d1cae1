r"""Run-time LoRA as more rank. The low-rank branch sees the raw input, as a LoRA does, so that fusing is concatenation:

    down' = [down ; A₁ ; A₂ ; 0]    up' = [up | s₁ B₁ | s₂ B₂ | 0]    y = … + (x down'ᵀ) up'ᵀ

with adapters A (r, K), B (N, r) and strengths s, padded with zeros to a multiple of 16. The first ranks stay as they are: cutting the
rest off restores the layer bit for bit. Nothing is quantized again. After fusing, peft's own layers are marked as merged and cost nothing.
Hu et al., 2021, https://arxiv.org/abs/2106.09685 · the idea for 4-bit layers: https://github.com/nunchaku-tech/nunchaku
"""

__all__ = ["append_rank", "cut_rank", "fuse_lora", "unfuse_lora"]

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qgen.nn.packed import Packed

_MULTIPLE = 16


def fuse_lora(x: Any) -> Any:
    """Moves the active adapters of a pipeline or module into the low-rank branches, at their current strengths, and returns x.

    Adapters on layers that stayed float are merged into the weight, of which a copy is kept. Afterwards `unload_lora_weights` may free
    peft's tensors; `unfuse_lora` takes the adapters out again. Fusing more adapters later adds them.

    Raises ValueError, with nothing changed, if no adapter is active or one is no plain LoRA (DoRA, bias).
    """
    found = [(layer, names) for layer in _adapted(x) if (names := _active(layer))]
    if not found:
        raise ValueError(
            f"{type(x).__name__} has no active LoRA to fuse: call load_lora_weights (and set_adapters) first"
        )
    for layer, names in found:
        _refuse_variants(layer, names)
    for layer, names in found:
        base = layer.get_base_layer()
        if isinstance(base, Packed):
            append_rank(base, _factors(layer, names))
            layer.merged_adapters.extend(names)
        else:
            if not hasattr(base, "_qgen_unfused"):
                base._qgen_unfused = base.weight.detach().clone()
            layer.merge(adapter_names=names)
    return x


def unfuse_lora(x: Any) -> Any:
    """Undoes every `fuse_lora`, bit for bit, and returns x. Adapters that are still loaded are active again.

    ValueError if nothing is fused.
    """
    fused = [layer for layer in _modules(x) if isinstance(layer, Packed) and layer.fused_from is not None]
    kept = [layer for layer in _modules(x) if hasattr(layer, "_qgen_unfused")]
    if not fused and not kept:
        raise ValueError(f"{type(x).__name__} has no fused LoRA")
    for layer in fused:
        cut_rank(layer)
    for base in kept:
        with torch.no_grad():
            base.weight.copy_(base._qgen_unfused)
        del base._qgen_unfused
    for layer in _adapted(x):
        layer.merged_adapters.clear()
    return x


def _modules(x: Any) -> Iterator[nn.Module]:
    """All modules of a module, or of a pipeline's components."""
    for part in [x] if isinstance(x, nn.Module) else getattr(x, "components", {}).values():
        if isinstance(part, nn.Module):
            yield from part.modules()


def _adapted(x: Any) -> Iterator[Any]:
    """peft's LoRA layers in x; none if peft is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        return
    yield from (layer for layer in _modules(x) if isinstance(layer, LoraLayer))


def _active(layer: Any) -> list[str]:
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]


def _refuse_variants(layer: Any, names: list[str]) -> None:
    for name in names:
        odd = [kind for kind in ("use_dora", "lora_bias") if getattr(layer, kind, {}).get(name)]
        odd += [type(v).__name__ for key, v in getattr(layer, "lora_variant", {}).items() if key == name]
        if odd:
            raise ValueError(
                f"adapter {name!r} is no plain LoRA ({', '.join(odd)}) and cannot be fused; use it unfused"
            )


def _factors(layer: Any, names: list[str]) -> list[tuple[Tensor, Tensor]]:
    """A (R, K) and s B (N, R) of each named adapter, float32."""
    return [
        (
            layer.lora_A[name].weight.detach().float().flatten(1),
            layer.lora_B[name].weight.detach().float().flatten(1) * layer.scaling[name],
        )
        for name in names
    ]


def append_rank(layer: Packed, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Puts adapters behind the layer's own low-rank branch. pairs: A (R, K) and s B (N, R) of each, float32.

    A and B are brought to like magnitude, so that 16 bits hold both well, and the whole is padded to a multiple of 16 ranks.
    """
    slots = layer.canonical()
    dtype, device = slots["down"].dtype if "down" in slots else layer.compute_dtype, slots["codes"].device
    downs, ups = ([slots["down"]], [slots["up"]]) if "down" in slots else ([], [])
    for a, b in pairs:
        top_a, top_b = float(a.abs().max()), float(b.abs().max())
        # A power of two rounds nothing.
        balance = 2.0 ** round(math.log2(top_b / top_a) / 2) if top_a and top_b else 1.0
        downs.append((a * balance).to(device, dtype))
        ups.append((b / balance).to(device, dtype))
    down, up = torch.cat(downs), torch.cat(ups, 1)
    more = -down.shape[0] % _MULTIPLE
    rank, before = layer.rank, layer.unfused
    moved = _beside(slots, down[rank:].float(), up[:, rank:].float())
    _refill(layer, {**slots, **moved, "down": F.pad(down, (0, 0, 0, more)), "up": F.pad(up, (0, more))})
    layer.fused_from = rank if layer.fused_from is None else layer.fused_from
    layer.unfused = {name: slots[name].cpu() for name in moved} | before


def _beside(slots: dict[str, Tensor], down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The slots beside the op that change with an adapter up · down, which is meant for the raw input and for known rows as well."""
    made = {}
    if (
        "t_shift" in slots
    ):  # what the adapter makes of the shifts is taken off; their rows go with the last ones of the bias
        bias, shift = slots["t_bias"].float().clone(), slots["t_shift"].float()
        bias[-len(shift) :] -= (shift @ down.T) @ up.T
        made["t_bias"] = bias.to(slots["t_bias"].dtype)
    if "known_x" in slots:
        output = slots["known_y"].float() + (slots["known_x"].float() @ down.T) @ up.T
        made["known_y"] = output.to(slots["known_y"].dtype)
    return made


def cut_rank(layer: Packed) -> None:
    """Undoes every `append_rank` of a layer, bit for bit; nothing if there was none."""
    rank, slots = layer.fused_from, layer.canonical()
    if rank is None:
        return
    if rank:
        slots["down"], slots["up"] = slots["down"][:rank].contiguous(), slots["up"][:, :rank].contiguous()
    else:
        del slots["down"], slots["up"]
    _refill(layer, slots | {name: t.to(slots[name]) for name, t in layer.unfused.items()})
    layer.fused_from, layer.unfused = None, {}


def _refill(layer: Packed, slots: dict[str, Tensor]) -> None:
    """New canonical tensors, on the same kernel where it serves the new rank."""
    kernel = layer.kernel
    layer.fill(slots)
    if kernel is not None:
        layer.prepare(layer.serves(kernel))
