"""Random quantized layers in canonical tensors, and how far a kernel may be from the reference."""

__all__ = ["close", "make_layer", "packed", "run_reference"]

import torch

from qgen import formats
from qgen.kernels import reference, registry
from qgen.kernels.slots import Slots


def make_layer(weight, act, n, k, dtype=torch.bfloat16, rank=0, smooth=True, shift=None, bias=True, hadamard=0):
    """(slots, ask) of a layer with N = n outputs and K = k inputs. shift: None, "scalar" or "row"."""
    kp = formats.padded(k, weight, act, multiple=hadamard or 1)
    w = torch.nn.functional.pad(torch.randn(n, k) * torch.exp(torch.randn(n, 1) / 3), (0, kp - k))
    w[n // 2] = 0  # a row of zeros
    q = formats.get(weight).quantize(w)
    slots = {
        "codes": q.codes,
        "scales": q.scales,
        "global_scale": q.global_scale,
        "zero": q.zero,
        "smooth": torch.rand(k).add(0.5).to(dtype) if smooth else None,
        "down": (torch.randn(rank, k) / k**0.5).to(dtype) if rank else None,
        "up": torch.randn(n, rank).to(dtype) if rank else None,
        "bias": torch.randn(n).to(dtype) if bias else None,
        "shift": {None: None, "scalar": torch.tensor(0.17), "row": torch.rand(k)}[shift],
    }
    if slots["shift"] is not None:
        slots["shift"] = slots["shift"].to(dtype)
    slots = {name: t for name, t in slots.items() if t is not None}
    traits = {name for name in ("smooth", "shift", "bias") if name in slots} | ({"lowrank"} if rank else set())
    return slots, registry.Ask("linear", "cpu", weight, act, dtype, n, k, rank, None, frozenset(traits))


def arguments(slots, ask, hadamard=0):
    """The layer's record: what a kernel takes behind x, or, unpacked, the op."""
    return Slots.of(slots, ask.weight, ask.act, ask.n, hadamard)


def packed(kernel, slots, ask, hadamard=0):
    """The layer's record in a kernel's own layout."""
    return arguments({name: t.contiguous() for name, t in kernel.pack(dict(slots), ask).items()}, ask, hadamard)


def run_reference(x, slots, ask, hadamard=0):
    """The reference's output in float32: what is compared is not rounded twice."""
    return reference.linear(x.float(), arguments({k: _wide(k, v) for k, v in slots.items()}, ask, hadamard))


def _wide(name, t):
    return t.float() if name in ("smooth", "down", "up", "bias", "shift") else t


def close(y, want, rms=4e-3, worst=2e-2):
    """Asserts relative RMS ≤ rms and every element within worst · max(RMS, |want|); all finite."""
    y, want = y.float(), want.float()
    assert y.isfinite().all()
    size = want.square().mean().sqrt()
    error = y - want
    assert error.square().mean().sqrt() <= rms * size, (
        f"relative RMS {(error.square().mean().sqrt() / size).item():.2e}"
    )
    assert (error.abs() <= worst * want.abs().clamp_min(size)).all()
