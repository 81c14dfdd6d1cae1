"""One picture of the table: PSNR against the 16-bit pictures over megabytes of the denoiser, with intervals, and the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qgen.bench.pareto import Point, front
from qgen.eval.bootstrap import bootstrap_mean

__all__ = ["plot"]

MARKS = {4: "o", 8: "s", 16: "^"}
COLOURS = ("#dc2626", "#0e7490", "#6d28d9", "#15803d", "#a16207", "#1d4ed8", "#be185d", "#4b5563", "#65a30d")


def plot(points: Sequence[Point], path: Path, title: str = "") -> Path:
    """Writes a PNG and returns its path. ValueError if no point has a finite PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [p for p in points if math.isfinite(p.mean)]
    if not shown:
        raise ValueError("no row has a finite PSNR: there is nothing to plot")
    peers = sorted({p.name.partition(" ")[0] for p in shown}, key=lambda name: (name != "qgen", name))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(peers)}
    figure, axes = plt.subplots(figsize=(11, 7), dpi=110)
    edge = front(shown)
    axes.step([p.nbytes / 2**20 for p in edge], [p.mean for p in edge], where="post", color="#9ca3af", lw=1, zorder=1)
    for p in shown:
        peer = p.name.partition(" ")[0]
        spread = bootstrap_mean(p.psnr)
        bars = [[p.mean - spread.low], [spread.high - p.mean]]
        x = p.nbytes / 2**20
        axes.errorbar(x, p.mean, yerr=bars, color=colour[peer], lw=0.8, alpha=0.35, zorder=2)
        axes.scatter(x, p.mean, s=58 if p.ours else 38, marker=MARKS.get(p.act, "D"), color=colour[peer], zorder=3)
    _label(axes, shown, colour)
    for name in peers:
        axes.scatter([], [], color=colour[name], label=name)
    for act in sorted({p.act for p in shown}):
        axes.scatter([], [], color="#111827", marker=MARKS.get(act, "D"), label=f"{act}-bit inputs")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.set_xlabel("denoiser as saved, MiB")
    axes.set_ylabel("PSNR against the 16-bit pictures, dB (95 % interval over prompts)")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.margins(x=0.08)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "qgen"})
    plt.close(figure)
    return path


def _label(axes, shown: Sequence[Point], colour: dict[str, str]) -> None:
    """Names beside the points, each moved up or down until it covers no other name."""
    axes.figure.canvas.draw()
    taken: list[tuple[float, float, float]] = []  # left, right, middle of names that are placed, in pixels
    for p in sorted(shown, key=lambda p: -p.mean):
        peer, _, config = p.name.partition(" ")
        x, y = axes.transData.transform((p.nbytes / 2**20, p.mean))
        width = 6.5 * len(config) + 8
        steps = sorted(range(-12, 13), key=lambda k: (abs(k), k))
        free = lambda k: all(x + width < left or x > right or abs(y + 11 * k - mid) >= 11 for left, right, mid in taken)  # noqa: E731, B023
        k = next((k for k in steps if free(k)), 0)
        taken.append((x, x + width, y + 11 * k))
        offset = (6, 11 * k * 72 / axes.figure.dpi - 3)
        arrow = {"arrowstyle": "-", "color": colour[peer], "lw": 0.4, "alpha": 0.6} if k else None
        axes.annotate(
            config, (p.nbytes / 2**20, p.mean), offset, textcoords="offset points", fontsize=7, color=colour[peer],
            arrowprops=arrow,
        )  # fmt: skip
