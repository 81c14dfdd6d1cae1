"""Who is better than whom, computed: error against bytes, never one without the other.

A row is on the front if no other row is at most as large and at least as close to the 16-bit pictures, and better in one of the two. A
peer is called better than qgen only against all of qgen's recipes of its size or smaller, and only if the paired difference over
prompts has an interval above zero; qgen is held to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qgen.eval.bootstrap import Interval, bootstrap_difference

__all__ = ["Point", "front", "statements", "verdict"]

SAME = 1.01  # sizes within one percent count as equal


@dataclass(frozen=True)
class Point:
    """A row as this module sees it: bytes of the denoiser, PSNR per prompt in dB, bits of its inputs, and whether it is qgen's."""

    name: str
    ours: bool
    nbytes: int
    psnr: tuple[float, ...]
    act: int = 16

    @property
    def mean(self) -> float:
        return sum(self.psnr) / len(self.psnr)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, from small to large."""

    def beaten(p: Point) -> bool:
        return any(
            q.nbytes <= p.nbytes and q.mean >= p.mean and (q.nbytes < p.nbytes or q.mean > p.mean) for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: (p.nbytes, p.name))


def verdict(point: Point, others: Sequence[Point]) -> tuple[Point, Interval] | None:
    """The closest rival among `others` of its size or smaller, and the paired difference point - rival; None if there is no rival."""
    rivals = [q for q in others if q.nbytes <= SAME * point.nbytes]
    if not rivals:
        return None
    best = max(rivals, key=lambda q: q.mean)
    return best, bootstrap_difference(point.psnr, best.psnr)


def statements(points: Sequence[Point]) -> list[str]:
    """Lines of text: the front, where a peer is better, where a recipe is, and the best row for each width of inputs."""
    if not points:
        return []
    ours, theirs = [p for p in points if p.ours], [p for p in points if not p.ours]
    lines = [
        "On the front (no row is both as small and as close to 16 bits): "
        + ", ".join(p.name for p in front(points))
        + "."
    ]
    if not ours or not theirs:
        return lines
    lines += _better(theirs, ours, "qgen recipe") or [
        "No peer is better than every qgen recipe of its size or smaller, beyond chance."
    ]
    lines += _better(ours, theirs, "peer")
    for act in sorted({p.act for p in points}):
        mine, rest = ([p for p in group if p.act == act] for group in (ours, theirs))
        if mine and rest:
            a, b = max(mine, key=_mean), max(rest, key=_mean)
            lines.append(
                f"Inputs of {act} bits, whatever the size: the best recipe is {a.name} ({a.mean:.1f} dB, {_mib(a)}), the best peer "
                f"{b.name} ({b.mean:.1f} dB, {_mib(b)}); paired difference {_said(bootstrap_difference(a.psnr, b.psnr))}."
            )
    return lines


def _better(group: Sequence[Point], others: Sequence[Point], what: str) -> list[str]:
    """A line for each point of `group` that is better than all `others` of its size or smaller, or smaller than all of them."""
    lines = []
    for p in sorted(group, key=lambda p: (p.nbytes, p.name)):
        found = verdict(p, others)
        if found is None:
            least = min(others, key=lambda q: q.nbytes)
            lines.append(f"{p.name} is smaller than every {what}: {_mib(p)} against {_mib(least)} of {least.name}.")
        elif found[1].low > 0:
            lines.append(
                f"{p.name} ({p.mean:.1f} dB, {_mib(p)}) is better than every {what} of the same size or smaller: "
                f"{_said(found[1])} over {found[0].name} ({_mib(found[0])})."
            )
    return lines


_mean: Callable[[Point], float] = lambda p: p.mean  # noqa: E731


def _mib(p: Point) -> str:
    return f"{p.nbytes / 2**20:.2f} MiB"


def _said(gap: Interval) -> str:
    return f"{gap.mean:+.2f} dB [{gap.low:+.2f}, {gap.high:+.2f}]"
