r"""What a compiled loop means for a whole layer on a named card: the share of the tensor cores' peak that the model
allows.

    share = (M · N · K / rate) / (⌈tiles / SMs⌉ · warps · (trips · loop + rest))        all in clocks of one scheduler
    · 4

`loop` and `rest` are what `qgen.kernels.efficiency` gives for the innermost loop and for everything outside it (which
runs once per tile: addresses, the low-rank product, bias, the store). Tiles that do not fill the last wave idle. It
says what the instruction stream allows; memory, latency and clocks under load are not in it, and none of it was
timed.
"""

__all__ = ["LAYER", "LayerShare", "layer_share"]

from dataclasses import dataclass

from qgen.kernels.aot_case import AotCase, arch_of
from qgen.kernels.aot_compile import Compiled
from qgen.kernels.efficiency import loop_clocks, rate
from qgen.kernels.roofline import Card
from qgen.kernels.sass import mma_loop

LAYER = (4096, 12288, 3072)  # M, N, K: up-projection of a 12-billion-parameter image transformer at 1024 x 1024 pixels
SCHEDULERS = 4  # per streaming multiprocessor


@dataclass(frozen=True)
class LayerShare:
    """Share of the tensor cores' peak (0 to 1) for one kernel, card and layer, and what takes the rest.

    loop: the share inside the loop alone. waves: the part kept by filling the last wave. outside: clocks outside the
    loop as a part of all.
    """

    name: str
    card: str
    share: float
    loop: float
    limit: str
    waves: float
    outside: float


def layer_share(
    case: AotCase, compiled: Compiled, card: Card, shape: tuple[int, int, int] = LAYER
) -> LayerShare | None:
    """The share for a layer of `shape` (M, N, K); None where the case names no tile or a rate is unknown.

    Arguments:
        case: with `tile` and `macs` of exactly one operand type.
        compiled: for the card's capability.
    """
    if case.tile is None or len(case.macs) != 1 or compiled.error:
        return None
    capability = int(arch_of(card.capability)[1])
    listing = compiled.listing
    loop = mma_loop(listing)
    inside = {i.address for i in loop}
    rest = [i for i in listing if i.address not in inside]
    clocks = loop_clocks(loop, capability, compiled.warps, case.macs)
    outside = loop_clocks(rest, capability, compiled.warps)
    ((operand, macs),) = case.macs.items()
    if clocks is None or outside is None or not loop:
        return None
    (m, n, k), (bm, bn) = shape, case.tile
    trips = k / (macs / (bm * bn))
    unrolled = max(1, round(clocks.tensor * compiled.warps * (rate(capability, operand) or 0) / macs))
    tile = trips / unrolled * clocks.total + outside.total  # clocks of one warp
    tiles = -(-m // bm) * -(-n // bn)
    per_sm = -(-tiles // card.sms)
    ideal = m * n * k / (rate(capability, operand) * SCHEDULERS * card.sms)
    spent = per_sm * tile * compiled.warps / SCHEDULERS
    return LayerShare(
        case.name,
        card.name,
        share=ideal / spent,
        loop=clocks.share,
        limit=clocks.limit,
        waves=tiles / (per_sm * card.sms),
        outside=outside.total / tile,
    )
