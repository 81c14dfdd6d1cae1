"""Contests of linear layers: every kernel that serves a pair of formats on this device, cuBLAS in bf16, other
people's packages.

Layers are y = x · Wᵀ with smoothing, bias and a rank-32 branch, as SVDQuant makes them; the baseline is plain bf16 of
the same shape without the extras. Each kernel is held to the reference of its own codes, each package to the float
product.
"""

__all__ = ["CONV_SHAPES", "SHAPES", "contest", "conv_contest"]

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qgen import formats
from qgen.kernels import doctor, registry
from qgen.kernels.bench_packages import linear_packages
from qgen.kernels.bench_run import Contest, Contestant
from qgen.kernels.registry import Ask
from qgen.kernels.roofline import Card, Gemm, gemm_seconds
from qgen.kernels.slots import Slots

# M, K, N: attention, feed-forward up and down of a 12-billion-parameter image transformer at 1024 x 1024; its
# modulation.
SHAPES = ((4096, 3072, 3072), (4096, 3072, 12288), (4096, 12288, 3072), (1, 3072, 18432))
CONV_SHAPES = (
    (2, 320, 128, 320),
    (2, 1280, 32, 1280),
)  # B, C, side, N: outer and inner blocks of a UNet at 1024 x 1024
RANK = 32
KERNEL_TOLERANCE = 1e-2  # two roundings to bf16, and ties of activation codes that fall the other way
PACKAGE_TOLERANCE = 0.2  # quantized by their own rules, against the float product: NF4 and int4 are about 0.1
OPERAND = {4: {"int": "s8", "fp": "fp4"}, 8: {"int": "s8", "fp": "fp8"}}


def contest(
    shape: tuple[int, int, int], device: torch.device, card: Card | None = None, dtype: torch.dtype = torch.bfloat16
) -> Contest:
    """All contestants for one layer of `shape` (M, K, N) on `device`."""
    m, k, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device, dtype)
    bf16 = Gemm(m, n, k, "bf16", 16, 16, scale_bits=0)
    contestants = [Contestant("cuBLAS bf16", lambda: F.linear(x, weight), KERNEL_TOLERANCE, _bound(bf16, card))]
    truths = {"cuBLAS bf16": lambda: x.float() @ weight.float().T}
    for name, kernel, slots, packed, rest in _served(weight, device, generator):
        bound = _bound(_gemm(m, n, k, *rest[:2]), card)
        contestants.append(Contestant(name, _bind(kernel, x, packed, rest), KERNEL_TOLERANCE, bound))
        truths[name] = _bind(registry.find("linear", "reference").run, x.float(), slots, rest)
    for name, call in linear_packages(x, weight):
        contestants.append(Contestant(name, call, PACKAGE_TOLERANCE))
        truths[name] = truths["cuBLAS bf16"]
    label = f"M={m} K={k} N={n}"
    return Contest("linear", label, 2 * m * n * k, tuple(contestants), lambda name: truths[name](), "cuBLAS bf16")


def conv_contest(
    shape: tuple[int, int, int, int],
    device: torch.device,
    card: Card | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Contest:
    """Convolutions of 3 x 3: cuDNN in bf16, and kernels of linear layers over unfolded patches, unfolding included.

    shape: (B, C, side, N), B images of C channels, side x side pixels, N outputs.
    """
    b, c, side, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, c, side, side, generator=generator).to(device, dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(n, c, 3, 3, generator=generator) / (9 * c) ** 0.5).to(device, dtype)
    m, k = b * side * side, 9 * c
    contestants = [
        Contestant(
            "cuDNN bf16", lambda: F.conv2d(x, weight, padding=1), KERNEL_TOLERANCE,
            _bound(Gemm(m, n, k, "bf16", 16, 16, scale_bits=0), card), lambda y: y.flatten(2).transpose(1, 2),
        )
    ]  # fmt: skip
    truths = {"cuDNN bf16": lambda: F.unfold(x.float(), 3, padding=1).transpose(1, 2) @ weight.float().flatten(1).T}

    def patches(kernel):
        return lambda x, slots: kernel(F.unfold(x, 3, padding=1).transpose(1, 2).contiguous(), slots)

    for name, kernel, slots, packed, rest in _served(weight.flatten(1), device, generator):
        bound = _bound(_gemm(m, n, k, *rest[:2]), card)
        contestants.append(Contestant(name, _bind(patches(kernel), x, packed, rest), KERNEL_TOLERANCE, bound))
        truths[name] = _bind(patches(registry.find("linear", "reference").run), x.float(), slots, rest)
    label = f"B={b} C={c} {side}x{side} N={n} 3x3"
    return Contest("conv", label, 2 * m * n * k, tuple(contestants), lambda name: truths[name](), "cuDNN bf16")


def _served(weight: Tensor, device: torch.device, generator: torch.Generator) -> Iterator[tuple]:
    """(name, run, canonical slots, packed slots, format arguments) of every kernel that serves a pair of `doctor.PAIRS`."""
    n, k = weight.shape
    kind, capability = doctor.capability(device)
    for what, (weight_format, act) in doctor.PAIRS.items():
        if k % (formats.get(weight_format).block or 1) or (act and k % (formats.get(act).block or 1)):
            continue
        ask = Ask("linear", kind, weight_format, act, weight.dtype, n, k, RANK, capability, doctor.TRAITS)
        slots = _slots(weight, weight_format, RANK, generator)
        for _, kernel in registry.kernels.items():
            if kernel.op == "linear" and kernel.name != "reference" and not kernel.needs.refusals(ask):
                packed = {slot: t.contiguous() for slot, t in kernel.pack(slots, ask).items()}
                yield f"{kernel.name}: {what}", kernel.run, slots, packed, (weight_format, act, n, 0)


def _slots(weight: Tensor, weight_format: str, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Canonical slots on the weight's device, with every extra."""
    n, k = weight.shape
    q = formats.get(weight_format).quantize(weight)
    slots = {name: t for name, t in vars(q).items() if isinstance(t, Tensor)}

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(weight)

    return slots | {
        "smooth": normal(k).abs() + 0.5,
        "down": normal(rank, k) / k**0.5,
        "up": normal(n, rank) / rank**0.5,
        "bias": normal(n),
    }


def _bind(run, x: Tensor, slots: dict[str, Tensor], rest: tuple):
    record = Slots.of(slots, *rest)
    return lambda: run(x, record)


def _gemm(m: int, n: int, k: int, weight_format: str, act: str) -> Gemm:
    """The layer's work as the roofline sees it: which tensor cores, how many bits."""
    weight = formats.get(weight_format)
    extra = weight.bits_per_value(k) - weight.bits
    if not act:
        return Gemm(m, n, k, "bf16", weight.bits, 16, RANK, extra)
    element = formats.get(act).element
    kind = "int" if "int" in element.name else "fp"
    return Gemm(m, n, k, OPERAND[element.bits][kind], weight.bits, element.bits, RANK, extra)


def _bound(gemm: Gemm, card: Card | None) -> float | None:
    return None if card is None or gemm.operand not in card.tflops else gemm_seconds(gemm, card)
