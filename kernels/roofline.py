r"""Bounds from data sheets: the least time that a card's arithmetic and memory allow. A bound is not a timing.

    t >= max(2 · M · N · K / peak, bytes / bandwidth)

Peaks are dense and at boost clocks, in TFLOP/s (integer operations count as FLOP); "fp8_f16" accumulates in float16,
which GeForce cards do at twice the rate. Names follow `qgen.kernels.aot_case.AotCase.macs`.
Sources: NVIDIA's A100 and H100 data sheets and its architecture papers of Ampere (GA102), Ada, Hopper and Blackwell, e.g.
https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf
"""

__all__ = ["CARDS", "Card", "Gemm", "attention_seconds", "card_of", "gemm_seconds"]

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card by its data sheet. tflops: operand type to 10¹² operations/s; bandwidth in 10⁹ bytes/s; clock in GHz."""

    name: str
    capability: tuple[int, int]
    sms: int
    clock: float
    bandwidth: float
    tflops: Mapping[str, float]


def _card(name, capability, sms, clock, bandwidth, **tflops) -> Card:
    return Card(name, capability, sms, clock, bandwidth, {**tflops, "f16": tflops["bf16"]})


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("A100", (8, 0), 108, 1.41, 2039, bf16=312, s8=624, s4=1248),
        _card("RTX 3090", (8, 6), 82, 1.695, 936, bf16=71, s8=284, s4=568),
        _card("RTX 4090", (8, 9), 128, 2.52, 1008, bf16=165, fp8=330, fp8_f16=661, s8=661, s4=1321),
        _card("H100", (9, 0), 132, 1.83, 3350, bf16=989, fp8=1979, s8=1979),
        _card("H200", (9, 0), 132, 1.83, 4800, bf16=989, fp8=1979, s8=1979),
        _card("B200", (10, 0), 148, 1.85, 8000, bf16=2250, fp8=4500, s8=4500, fp4=9000),
        _card("RTX 5090", (12, 0), 170, 2.407, 1792, bf16=209.5, fp8=419, fp8_f16=838, s8=838, fp4=1676),
    )
}


@dataclass(frozen=True)
class Gemm:
    """A linear layer's work: x (M, K) times a weight (N, K) of `weight_bits`, with a low-rank branch of rank R in 16
    bits.

    act_bits: bits of the activations that the matrix product reads (16 where they stay float). operand: what
    multiplies. scale_bits: bits of scales per weight value, e.g. 16 / 64; activation scales are left out (a few per
    mille).
    """

    m: int
    n: int
    k: int
    operand: str
    weight_bits: float
    act_bits: float
    rank: int = 0
    scale_bits: float = 0.25

    @property
    def flop(self) -> float:
        return 2 * self.m * self.n * self.k

    @property
    def nbytes(self) -> float:
        """Bytes that must cross memory once: both operands, the low-rank factors and the 16-bit output."""
        weight = self.n * self.k * (self.weight_bits + self.scale_bits) / 8
        return weight + self.m * self.k * self.act_bits / 8 + 2 * self.rank * (self.m + self.n) + 2 * self.m * self.n


def gemm_seconds(gemm: Gemm, card: Card) -> float:
    """The least time of one layer on `card`: arithmetic or memory, whichever is longer, and the low-rank product at
    16 bits.

    ValueError if the card has no tensor cores for the operand.
    """
    if gemm.operand not in card.tflops:
        have = ", ".join(sorted(card.tflops))
        raise ValueError(f"{card.name} has no tensor cores for {gemm.operand}; it has {have}")
    main = max(gemm.flop / (card.tflops[gemm.operand] * 1e12), gemm.nbytes / (card.bandwidth * 1e9))
    return main + 2 * gemm.m * gemm.n * gemm.rank / (card.tflops["bf16"] * 1e12)


def attention_seconds(b: int, h: int, tokens: int, d: int, qk: str, pv: str, card: Card) -> float:
    """The least time of softmax(QKᵀ)V for B batches of H heads: two products of 2 B H L² D operations each, and the
    exponentials.

    A streaming multiprocessor computes 16 exponentials per clock, which bounds heads of 64 on server cards.
    """
    product = 2 * b * h * tokens**2 * d
    tensor = product / (card.tflops[qk] * 1e12) + product / (card.tflops[pv] * 1e12)
    return max(tensor, b * h * tokens**2 / (16 * card.sms * card.clock * 1e9))


def card_of(name: str) -> Card | None:
    """The card whose name occurs in what the driver calls the device, e.g. "NVIDIA GeForce RTX 4090"; None if unknown.

    Laptop and cut-down versions ("RTX 4090 Laptop GPU", "RTX 4090 D") differ and are not guessed at.
    """
    if any(word in name.split() for word in ("Laptop", "D", "PCIe", "NVL")):
        return None
    return next((card for card in CARDS.values() if card.name in name), None)
