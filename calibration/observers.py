"""Streaming statistics of a layer's input: updated row by row, mergeable in any order, with a size known before any data flows.

Sums run in float64 over what each call adds in float32: rounded to float32 at the end they do not show in which order, or in how many
processes, the calls came.
"""

__all__ = ["AbsMax", "Gram", "Observer", "Reservoir"]

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from qgen.calibration.base import Moment


class Observer(Protocol):
    """A streaming statistic of rows x (M, K)."""

    def update(self, x: Tensor, moment: Moment) -> None: ...

    def merge(self, other: "Observer") -> None: ...

    def nbytes(self, k: int) -> int: ...

    @property
    def empty(self) -> bool: ...


class AbsMax:
    """Largest magnitude and mean magnitude of each column, (K,) float32, over the calls that are not held out."""

    def __init__(self):
        self.absmax: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0

    def update(self, x: Tensor, moment: Moment) -> None:
        if moment.held:
            return
        magnitude = x.float().abs()
        self._add(magnitude.amax(0), magnitude.sum(0, dtype=torch.float64), len(x))

    def merge(self, other: "AbsMax") -> None:
        if other.count:
            self._add(other.absmax, other.total, other.count)

    def _add(self, absmax: Tensor, total: Tensor, count: int) -> None:
        self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
        self.total = total if self.total is None else self.total + total
        self.count += count

    @property
    def empty(self) -> bool:
        return not self.count

    @property
    def mean(self) -> Tensor:
        """Mean magnitude (K,) float32."""
        return (self.total / self.count).float()

    def nbytes(self, k: int) -> int:
        return 12 * k


class Gram:
    """Mean of x xᵀ, (K, K) float32, over the calls that are not held out.

    rows: how many are expected, 0 = unknown. Where so few rows take less memory than the matrix they are kept as they come, and multiplied
    when the mean is asked for; more rows than that are added up at once. The sum is held as float64 strips, up to the diagonal alone: what
    lies right of it is copied at the end, so that they take little more memory than the whole matrix in float32.
    """

    def __init__(self, rows: int = 0, itemsize: int = 4):
        self.rows, self.itemsize = rows, itemsize
        self.total: list[Tensor] = []
        self.count = 0
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor, moment: Moment) -> None:
        if moment.held:
            return
        self.count += len(x)
        self._waiting.append(x)
        if self._keeps(x.shape[1]) and self.count <= self.rows:
            self._waiting[-1] = x.clone()  # the caller's memory may be used again
        else:
            self._fold()

    def _keeps(self, k: int) -> bool:
        return self.rows * self.itemsize * k < _strips_nbytes(k)

    def _fold(self) -> None:
        for x in self._waiting:
            x, k = x.float(), x.shape[1]
            if not self.total:
                self.total = [x.new_zeros(s.stop - s.start, s.stop, dtype=torch.float64) for s in _strips(k)]
            space = x.new_empty(_STRIP * k)  # one product after the other stays in the cache
            for total, strip in zip(self.total, _strips(k), strict=True):
                product = space[: total.numel()].view(total.shape)
                total += torch.mm(x[:, strip].T, x[:, : strip.stop], out=product)
        self._waiting = []

    def merge(self, other: "Gram") -> None:
        if other.count:
            self._fold()
            other._fold()
            pairs = zip(self.total, other.total, strict=True)
            self.total = [a + b for a, b in pairs] if self.total else [t.clone() for t in other.total]
            self.count += other.count

    @property
    def empty(self) -> bool:
        return not self.count

    @property
    def mean(self) -> Tensor:
        """(K, K) float32."""
        self._fold()
        k = self.total[-1].shape[1]
        made = self.total[0].new_empty(k, k, dtype=torch.float32)
        for total, strip in zip(self.total, _strips(k), strict=True):
            made[strip, : strip.stop] = total / self.count
            made[: strip.start, strip] = made[strip, : strip.start].T
        return made

    def nbytes(self, k: int) -> int:
        return self.rows * self.itemsize * k if self.rows and self._keeps(k) else _strips_nbytes(k)


_STRIP = 128  # rows: at K = 1152 as quick as adding up in float32, at K = 4608 a quarter slower


def _strips(k: int) -> list[slice]:
    """The rows of a (K, K) matrix, some at a time."""
    return [slice(low, min(k, low + _STRIP)) for low in range(0, k, _STRIP)]


def _strips_nbytes(k: int) -> int:
    return sum(8 * (strip.stop - strip.start) * strip.stop for strip in _strips(k))


class Reservoir:
    """A uniform sample of rows: `rows` of the calls that fit and a quarter as many of those held out, kept in the dtype in which they come.

    Every row gets a random key that depends on the seed and the call alone; the rows with the smallest keys stay. The sample is therefore
    the same whatever the order of calls, and two halves merge into what one pass would have kept.
    """

    def __init__(self, rows: int, seed: int = 0, itemsize: int = 4):
        self.rows, self.seed, self.itemsize = rows, seed, itemsize
        self._kept: dict[bool, tuple[Tensor, Tensor, Tensor] | None] = {False: None, True: None}

    def update(self, x: Tensor, moment: Moment) -> None:
        word = hashlib.sha256(self._drawn_by(moment).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(word[:7], "little"))
        keys = torch.rand(len(x), generator=generator, dtype=torch.float64)  # 53 bits: no two rows share a key
        limit = self._limit(moment.held)
        if len(x) > limit:
            keys, index = keys.topk(limit, largest=False)
            x = x[index.to(x.device)]
        t = torch.full_like(keys, torch.nan if moment.t is None else moment.t)
        self._add(moment.held, keys, x.detach().clone() if len(keys) == len(x) else x.detach(), t)

    def _drawn_by(self, moment: Moment) -> str:
        """What the keys of a call's rows depend on."""
        return f"{self.seed}/{moment.sample}/{moment.step}{moment.branch}"

    def merge(self, other: "Reservoir") -> None:
        for held, kept in other._kept.items():
            if kept is not None:
                self._add(held, *kept)

    def _limit(self, held: bool) -> int:
        return max(1, self.rows // 4) if held else self.rows

    def _add(self, held: bool, keys: Tensor, x: Tensor, t: Tensor) -> None:
        if (kept := self._kept[held]) is not None:
            keys, x, t = (torch.cat(pair) for pair in zip(kept, (keys, x, t), strict=True))
        if len(keys) > self._limit(held):
            keys, index = keys.topk(self._limit(held), largest=False)
            x, t = x[index.to(x.device)], t[index]
        self._kept[held] = (keys, x, t)

    @property
    def empty(self) -> bool:
        """Whether no row that may be fitted was seen."""
        return self._kept[False] is None

    def result(self, held: bool = False) -> Tensor | None:
        """Rows (M, K) float32 in the order of their keys, or None if none were seen."""
        kept = self._kept[held]
        return None if kept is None else kept[1][kept[0].argsort().to(kept[1].device)].float()

    def times(self, held: bool = False) -> Tensor | None:
        """Timesteps (M,) float32 of the rows of `result`, NaN where a call had none; or None if no rows were seen."""
        kept = self._kept[held]
        return None if kept is None else kept[2][kept[0].argsort()].float()

    def nbytes(self, k: int) -> int:
        return int(self.rows * 1.25) * (self.itemsize * k + 16)
