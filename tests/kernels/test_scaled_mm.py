"""The vendor-library kernels. For e4m3 torch's own CPU product runs; for NVFP4 a stand-in reads cuBLAS's layout by
its formula."""

import pytest
import torch

from qgen import formats
from qgen.kernels import reference, registry, scaled_mm
from qgen.kernels.registry import Ask
from qgen.kernels.slots import Slots

EXTRAS = [(), ("smooth", "bias"), ("smooth", "shift", "bias", "lowrank")]


def layer(weight, n, k, traits, rank=16):
    """Canonical slots of a layer with the extras of `traits`."""
    q = formats.get(weight).quantize(torch.randn(n, k) / k**0.5)
    slots = {name: t for name, t in vars(q).items() if isinstance(t, torch.Tensor)}
    if "smooth" in traits:
        slots["smooth"] = (torch.rand(k) + 0.5).bfloat16()
    if "shift" in traits:
        slots["shift"] = torch.full((), 0.25, dtype=torch.bfloat16)
    if "bias" in traits:
        slots["bias"] = torch.randn(n).bfloat16()
    if "lowrank" in traits:
        slots |= {"down": torch.randn(rank, k).bfloat16() / k**0.5, "up": torch.randn(n, rank).bfloat16()}
    return slots


def close(y, want, relative=6e-3):
    """Relative RMS. Two roundings to bf16 where the reference has one: 4e-3 each at most."""
    assert (y.float() - want).square().mean().sqrt() <= relative * want.square().mean().sqrt()


@pytest.mark.parametrize("traits", EXTRAS, ids="+".join)
@pytest.mark.parametrize("act", scaled_mm.FP8)
@pytest.mark.parametrize("weight", scaled_mm.FP8)
def test_fp8_against_the_reference(weight, act, traits):
    slots = layer(weight, 48, 64, traits)
    x = torch.randn(2, 5, 64).bfloat16()
    record = Slots.of(slots, weight, act, 48)
    y = registry.find("linear", "scaled_mm_fp8").run(x, record)
    assert y.shape == (2, 5, 48) and y.dtype == torch.bfloat16
    close(y, reference.linear(x.float(), record))


def test_fp8_static_scale():
    slots = layer("fp8_e4m3_tensor", 48, 64, ())
    slots["act_scale"] = torch.tensor(0.01)
    x = torch.randn(5, 64).bfloat16()
    record = Slots.of(slots, "fp8_e4m3_tensor", "fp8_e4m3_tensor", 48)
    close(scaled_mm.fp8_linear(x, record), reference.linear(x.float(), record))


def decode(codes, tiles, rows, k):
    """Values of `rows` rows: byte (r mod 32) · 16 + (r // 32) · 4 + g of tile (r // 128, g // 4) is the scale of row r, group g."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([table, -table]).double()
    raw = codes.view(torch.uint8)
    values = table[torch.stack([raw & 15, raw >> 4], -1).flatten(1).long()][:rows]
    r, g = torch.arange(rows)[:, None], torch.arange(k // 16)[None, :]
    across = -(-(k // 16) // 4)
    byte = ((r // 128) * across + g // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + g % 4
    return values * tiles.double()[byte].repeat_interleave(16, 1)


@pytest.mark.parametrize("traits", EXTRAS, ids="+".join)
@pytest.mark.parametrize("m", [1, 130])
def test_nvfp4_against_the_reference(m, traits, monkeypatch):
    n, k = 144, 192
    calls = []

    def stand_in(a, b, scale_a, scale_b, out_dtype):
        calls.append((a.dtype, b.stride()))
        assert scale_a.ndim == scale_b.ndim == 1 and scale_a.dtype == torch.float8_e4m3fn
        x, w = decode(a, scale_a, a.shape[0], k), decode(b.T, scale_b, n, k)
        return (x @ w.T).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    slots = layer("nvfp4", n, k, traits)
    kernel = registry.find("linear", "scaled_mm_nvfp4")
    packed = kernel.pack(slots, Ask("linear", "cuda", "nvfp4", "nvfp4_dynamic", n=n, k=k))
    x = torch.randn(m, k).bfloat16()
    rest = ("nvfp4", "nvfp4_dynamic", n)
    y = kernel.run(x, Slots.of(packed, *rest))
    close(y, reference.linear(x.float(), Slots.of(slots, *rest)))
    assert calls == [(torch.float4_e2m1fn_x2, (1, k // 2))]


def test_nvfp4_packing_there_and_back():
    slots, ask = layer("nvfp4", 80, 192, ("bias",)), Ask("linear", "cuda", "nvfp4", n=80, k=192)
    kernel = registry.find("linear", "scaled_mm_nvfp4")
    back = kernel.unpack(kernel.pack(slots, ask), ask)
    assert all(
        torch.equal(back[s].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)) for s, t in slots.items()
    )


@pytest.mark.parametrize("name", ["scaled_mm_fp8", "scaled_mm_nvfp4"])
def test_no_rows(name):
    weight, act = ("nvfp4", "nvfp4_dynamic") if "nvfp4" in name else ("fp8_e4m3_row", "fp8_e4m3_row")
    slots, ask = layer(weight, 16, 64, ()), Ask("linear", "cuda", weight, n=16, k=64)
    kernel = registry.find("linear", name)
    packed = kernel.pack(slots, ask)
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    assert kernel.run(x, Slots.of(packed, weight, act, 16)).shape == (0, 16)
