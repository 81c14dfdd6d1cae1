"""What a quantized linear layer is made of, as the kernels see it: one record instead of fourteen arguments.

The op's schema stays flat, as `torch.library` wants it; `ops.py` builds the record once and every kernel of the op
`linear` is called as `run(x, slots)`. Being a tuple it unpacks where a flat list of arguments is wanted.
"""

__all__ = ["SLOTS", "Slots"]

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Slots(NamedTuple):
    """Tensors of a layer with N outputs, K inputs and rank R, and what they mean.

    Shapes are those of the canonical layout, Kp = K padded to the format's block; a kernel that packs lays out codes,
    scales, zero, down and up its own way.
    """

    codes: Tensor  # (N, Kp * bits / 8) uint8
    scales: Tensor  # (N, Kp / block)
    global_scale: Tensor | None = None  # () or (N, 1) float32
    zero: Tensor | None = None  # (N, Kp / block)
    smooth: Tensor | None = None  # (K,), the input is divided by it
    down: Tensor | None = None  # (R, K), acts on the raw input
    up: Tensor | None = None  # (N, R)
    bias: Tensor | None = None  # (N,)
    shift: Tensor | None = None  # () or (K,), added to the raw input before smoothing, not seen by `down`
    act_scale: Tensor | None = None  # () or (Kp / block,) float32 static activation scales; None = dynamic
    weight: str = ""  # name of the weight's number format
    act: str = ""  # name of the activations' number format, "" = they stay float
    n: int = 0
    hadamard: int = 0  # size of the block transform along K, 0 = none

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weight: str, act: str, n: int, hadamard: int = 0) -> "Slots":
        """The record of `{slot: tensor}`, where absent slots are None."""
        return cls(*[tensors.get(slot) for slot in SLOTS], weight, act, n, hadamard)

    @property
    def rank(self) -> int:
        """Rank of the low-rank branch, 0 without one."""
        return 0 if self.down is None else self.down.shape[0]


SLOTS = Slots._fields[:10]
