r"""Layers that read one input become one layer, stacked along N: what original layouts call qkv and linear1.

exact    the same formats, smoothing and scale of the whole tensor: codes, scales, zeros and biases go on top of each other. Low-rank
         branches with one `down` stack their `up`; others become  down = [D₁; D₂; …],  up = diag(U₁, U₂, …)
rounded  otherwise: with the geometric mean of the smoothings, the residuals R are rounded anew, (R₁ / s₁ · s) …; branches are kept
floats   where formats differ or inputs are shifted apart, the weights are dequantized
"""

__all__ = ["joined", "picked"]

import math
from dataclasses import replace

import torch
from torch import Tensor

from qgen import formats
from qgen.io.parts import check
from qgen.io.peers.base import Layer, Plain
from qgen.io.peers.floats import dequantized
from qgen.kernels import reference
from qgen.nn.packed import Layout

BY_ROW = ("codes", "scales", "zero", "up", "bias")


def picked(layer: Layer, rows: Tensor, path: str) -> Layer:
    """The layer of the given rows, under another path. ValueError if it has tables over timesteps."""
    _untimed([layer])
    slots = {
        slot: t[rows].contiguous() if slot in BY_ROW or (slot == "global_scale" and t.ndim) else t
        for slot, t in layer.slots.items()
    }
    return replace(layer, path=path, shape=(len(rows), *layer.shape[1:]), slots=slots)


def joined(path: str, layers: list[Layer]) -> list[Layer | Plain]:
    """One layer called `path`, or its float weight and bias. ValueError if the layers differ in K or have tables over timesteps."""
    if len({layer.shape[1:] for layer in layers}) != 1:
        raise ValueError(f"{path!r}: {', '.join(layer.path for layer in layers)} read inputs of different widths")
    for layer in layers:
        check(layer)
    _untimed(layers)
    first, n = layers[0], sum(layer.shape[0] for layer in layers)
    alike = len({(x.layout.weight, x.layout.act, x.layout.hadamard, x.dtype, x.kind) for x in layers}) == 1
    if not alike or not all(_equal(layers, slot) for slot in ("shift", "act_scale")):
        return _floats(path, layers, n)
    exact = _equal(layers, "smooth") and (_equal(layers, "global_scale") or first.slots["global_scale"].ndim > 0)
    if not exact and "shift" in first.slots:
        return _floats(path, layers, n)
    slots, note = _stacked(layers) if exact else (_rounded(layers), "rounded anew: its parts had scales of their own")
    slots |= _branches(layers)
    if any("bias" in layer.slots for layer in layers):
        slots["bias"] = torch.cat([x.slots.get("bias", torch.zeros(x.shape[0], dtype=x.dtype)) for x in layers])
    for slot in ("shift", "act_scale"):
        if slot in first.slots:
            slots[slot] = first.slots[slot]
    rank = slots["down"].shape[0] if "down" in slots else 0
    there = tuple(slot for slot in slots if slot not in ("codes", "scales"))
    layout = Layout(first.layout.weight, first.layout.act, rank, first.layout.hadamard, there)
    return [check(Layer(path, (n, *first.shape[1:]), layout, slots, first.dtype, note))]


def _untimed(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.layout.bins:
            raise ValueError(
                f"{layer.path!r} has tables over timesteps and can be neither fused nor cut: use it under its own names"
            )
        if layer.layout.known:
            raise ValueError(
                f"{layer.path!r} keeps outputs of known rows and can be neither fused nor cut: use it under its own names"
            )


def _equal(layers: list[Layer], slot: str) -> bool:
    """Whether a slot is the same in all layers, or in none."""
    found = [layer.slots.get(slot) for layer in layers]
    if any(t is None for t in found):
        return all(t is None for t in found)
    return all(t.shape == found[0].shape and torch.equal(t, found[0]) for t in found)


def _stacked(layers: list[Layer]) -> tuple[dict[str, Tensor], str]:
    first = layers[0].slots
    slots = {slot: torch.cat([x.slots[slot] for x in layers]) for slot in ("codes", "scales", "zero") if slot in first}
    if "global_scale" in first:
        top = first["global_scale"]
        slots["global_scale"] = torch.cat([x.slots["global_scale"] for x in layers]) if top.ndim else top
    if "smooth" in first:
        slots["smooth"] = first["smooth"]
    return slots, ""


def _rounded(layers: list[Layer]) -> dict[str, Tensor]:
    """Residuals in one smoothed basis, rounded to nearest in the layers' own format."""
    first, k = layers[0], math.prod(layers[0].shape[1:])
    smooths = [x.slots.get("smooth", torch.ones(k)).float() for x in layers]
    common = torch.stack(smooths).log().mean(0).exp()
    kept = any("smooth" in x.slots for x in layers)
    common = common.to(first.slots.get("smooth", common).dtype).float() if kept else torch.ones(k)
    weights = []
    for layer, smooth in zip(layers, smooths, strict=True):
        s = layer.slots
        w = reference.weight(s["codes"], s["scales"], s.get("global_scale"), s.get("zero"), layer.layout.weight)
        w = reference.hadamard_blocks(w, layer.layout.hadamard) if layer.layout.hadamard else w
        weights.append(w[:, :k] / smooth * common)
    whole = torch.cat(weights)
    padded = formats.padded(k, first.layout.weight, first.layout.act, multiple=first.layout.hadamard or 1)
    whole = torch.nn.functional.pad(whole, (0, padded - k))
    whole = reference.hadamard_blocks(whole, first.layout.hadamard) if first.layout.hadamard else whole
    q = formats.get(first.layout.weight).quantize(whole)
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero}
    slots["smooth"] = common.to(next(x.slots["smooth"].dtype for x in layers if "smooth" in x.slots)) if kept else None
    return {slot: t for slot, t in slots.items() if t is not None}


def _branches(layers: list[Layer]) -> dict[str, Tensor]:
    """One low-rank branch for all."""
    if not any("down" in layer.slots for layer in layers):
        return {}
    dtype = next(layer.slots["down"].dtype for layer in layers if "down" in layer.slots)
    if _equal(layers, "down"):
        return {"down": layers[0].slots["down"], "up": torch.cat([layer.slots["up"] for layer in layers])}
    k = math.prod(layers[0].shape[1:])
    downs = [layer.slots.get("down", torch.empty(0, k, dtype=dtype)) for layer in layers]
    ups = [layer.slots.get("up", torch.empty(layer.shape[0], 0, dtype=dtype)) for layer in layers]
    return {"down": torch.cat(downs), "up": torch.block_diag(*ups)}


def _floats(path: str, layers: list[Layer], n: int) -> list[Layer | Plain]:
    made = [dequantized(layer) for layer in layers]
    dtype = layers[0].dtype
    parts: list[Layer | Plain] = [
        Plain(f"{path}.weight", torch.cat([w for w, _ in made]).to(dtype), "dequantized: its parts differ in format")
    ]
    if any(bias is not None for _, bias in made):
        biases = [torch.zeros(x.shape[0]) if b is None else b.float() for x, (_, b) in zip(layers, made, strict=True)]
        parts.append(Plain(f"{path}.bias", torch.cat(biases).to(dtype)))
    return parts
