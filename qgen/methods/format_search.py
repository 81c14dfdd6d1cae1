r"""Format search: which split of four bits into exponent and mantissa, and which clipping, serve this layer best.

    min over (F_w, F_a, c)  ‖Q_a(X) Q_w(W; c)ᵀ − X Wᵀ‖²

Uniform values want equal steps (e1m2, which is int4), bell-shaped ones e2m1, heavy tails e3m0, and what is bounded below an unsigned float
with a zero point. Sides take turns: given the other, each takes the format of least *output* error on the judge's rows; a turn keeps what
it had unless something is better, so that the error never rises. Clipping is per block of weights, by the diagonal of H as in `clip`.
LLM-FP4, Liu et al., 2023, https://arxiv.org/abs/2310.16836 · Chen et al., 2024, https://arxiv.org/abs/2408.06995 · signed or not, by layer:
MSFP, 2025, https://arxiv.org/abs/2505.21591
"""

__all__ = ["FormatSearch"]

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from qgen import formats
from qgen.methods.base import Stats
from qgen.methods.clip import Clip
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("format-search")
@dataclass(frozen=True)
class FormatSearch:
    """Changes the draft's number formats. Stands first, or after smoothing: methods after it work on the format that was chosen.

    weights, acts: names of formats that are tried beside the spec's own, of as many bits as it (ValueError otherwise); () leaves a side.
    clip: whether each weight format is also tried with clipped blocks. turns: of the two sides. rows: at most so many judge.
    """

    name: ClassVar[str] = "format-search"
    weights: tuple[str, ...] = ("fp4_e1m2_g64", "fp4_e2m1_g64", "fp4_e3m0_g64")
    acts: tuple[str, ...] = ()
    clip: bool = True
    turns: int = 3
    rows: int = 512

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "gram"} if self.clip else {"rows"})

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        _check(draft.spec.weight, self.weights)
        _check(draft.spec.act, self.acts)
        judge = stats.judge.first(self.rows)
        best = replace(draft, qweight=None)
        least, path = judge.error(best), []
        for _ in range(self.turns):
            before = least
            for side in (self._weights, self._acts):
                for trial in side(best, stats):
                    if (error := judge.error(trial)) < least:
                        best, least = trial, error
                path.append(least)
            if least == before:
                break
        return best.noted(formats=f"{best.spec}", errors=" ".join(f"{e:.3g}" for e in path))

    def _weights(self, draft: Draft, stats: Stats) -> Iterator[Draft]:
        for name in dict.fromkeys((draft.spec.weight, *self.weights)) if self.weights or self.clip else ():
            plain = replace(draft, spec=replace(draft.spec, weight=name), clip=1.0)
            yield plain
            if self.clip:
                yield Clip().refine(plain, stats)

    def _acts(self, draft: Draft, stats: Stats) -> Iterator[Draft]:
        return (replace(draft, spec=replace(draft.spec, act=name)) for name in self.acts)


def _check(own: str | None, names: tuple[str, ...]) -> None:
    """ValueError where a candidate has another number of bits than the spec's format: a better error would only be a dearer one."""
    if names and not own:
        raise ValueError(
            "format-search: the spec has 16-bit activations, so there is no activation format to search; leave acts=()"
        )
    for name in names:
        if (bits := formats.get(name).bits) != formats.get(own).bits:
            raise ValueError(
                f"format-search compares formats of equal bits: the spec has {own} of {formats.get(own).bits}, found {name} of {bits}"
            )
