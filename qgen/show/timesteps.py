"""Sampling along its timesteps, as sections of the report: what layers' tables hold by bin, and the error along the trajectory.

Both are inline SVG: no script, nothing loaded, readable in black and white.
"""

__all__ = ["ranges", "trajectory"]

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qgen.models import adapter_for
from qgen.nn.clock import whole_table
from qgen.nn.packed import Packed
from qgen.show.page import Markup, section, tag

_W, _H, _LEFT, _DASHES = 640, 220, 56, ("", "6 3", "2 3", "8 3 2 3")


def ranges(x: Any, most: int = 60) -> Markup:
    """Per layer and bin of timesteps: the static step size relative to the layer's largest, else its centre. Empty without bins."""
    rows = []
    for module in adapter_for(x).denoisers(x).values():
        for path, layer in module.named_modules():
            if isinstance(layer, Packed) and layer.t_edges is not None:
                name = next(name for name in ("t_scale", "t_shift", "t_bias") if getattr(layer, name) is not None)
                table = whole_table(layer, name)
                values = table[:-1].float().flatten(1).square().mean(1).sqrt() if table.ndim > 1 else table[:-1].float()
                what = {"t_scale": "step", "t_shift": "centre", "t_bias": "bias"}[name]
                rows.append((path, what, values.tolist(), layer.t_edges.tolist()))
    shown = rows[:most]
    lines = [_strip(*row) for row in shown]
    if len(rows) > most:
        lines.append(tag("p", f"{len(rows) - most} more layers", class_="about"))
    about = (
        "Each strip runs from clean images (left) to noise (right), cut where the layer's bins are; the darker, the larger what the layer "
        "keeps for that bin: the step of its static scale, else the RMS of its centre or bias. The largest of a layer is black."
    )
    return section("Activations by timestep", *lines, about=about)


def _strip(path: str, what: str, values: Sequence[float], edges: Sequence[float]) -> Markup:
    top = max((abs(v) for v in values), default=0.0) or 1.0
    end = 1.0 if edges and edges[-1] <= 1 else max(1000.0, edges[-1] if edges else 0.0)
    ends = [0.0, *(min(max(e / end, 0.0), 1.0) for e in edges), 1.0]
    cells = [
        tag(
            "rect", x=f"{300 * a:.1f}", y=0, width=f"{max(0.5, 300 * (b - a)):.1f}", height=12, fill="currentColor",
            fill_opacity=f"{0.05 + 0.9 * abs(v) / top:.2f}",
        )
        for v, a, b in zip(values, ends, ends[1:], strict=False)
    ]  # fmt: skip
    label = f"{what} {min(values):.3g} to {max(values):.3g}"
    bar = tag("svg", *cells, viewBox="0 0 300 12", width=300, height=12, role="img", aria_label=f"{path}: {label}")
    return tag("div", tag("span", path, class_="path"), bar, tag("span", f" {label}", class_="facts"))


def trajectory(errors: Mapping[str, Sequence[float]]) -> Markup:
    """Lines of relative RMS error of the latents, by step, for each name; drawn on a logarithmic axis.

    Raises ValueError if an error is negative, NaN or infinite. Empty without lines.
    """
    lines = {name: [float(v) for v in values] for name, values in errors.items() if len(values)}
    for name, values in lines.items():
        if not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"errors along the trajectory are finite and not negative, {name!r} holds others")
    positive = [v for values in lines.values() for v in values if v > 0]
    if not positive:
        return Markup("")
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)) + 1e-9)
    high = max(high, low + 1)
    steps = max(len(values) for values in lines.values())

    def place(i: int, v: float) -> str:
        height = (math.log10(max(v, 10.0**low)) - low) / (high - low)
        return f"{_LEFT + (_W - _LEFT - 8) * i / max(1, steps - 1):.1f},{_H - 24 - (_H - 40) * height:.1f}"

    drawn, keys = [], []
    for number, (name, values) in enumerate(lines.items()):
        dash = _DASHES[number % len(_DASHES)]
        points = " ".join(place(i, v) for i, v in enumerate(values))
        drawn.append(
            tag(
                "polyline",
                points=points,
                fill="none",
                stroke="currentColor",
                stroke_width=2,
                stroke_dasharray=dash or None,
            )
        )
        keys.append(
            tag("span", f"{['solid', 'dashed', 'dotted', 'dash-dotted'][number % 4]}: {name}; last {values[-1]:.3g}. ")
        )
    marks = []
    for power in range(low, high + 1):
        y = place(0, 10.0**power).partition(",")[2]
        marks.append(tag("line", x1=_LEFT, x2=_W - 8, y1=y, y2=y, stroke="currentColor", stroke_opacity="0.2"))
        marks.append(tag("text", f"{10.0**power:g}", x=4, y=y, font_size=11, fill="currentColor"))
    marks.append(
        tag("text", f"step 1 (noise) to {steps} (picture)", x=_LEFT, y=_H - 6, font_size=11, fill="currentColor")
    )
    svg = tag(
        "svg",
        *marks,
        *drawn,
        viewBox=f"0 0 {_W} {_H}",
        width="100%",
        role="img",
        aria_label="error along the trajectory",
    )
    return section(
        "Error along the trajectory",
        svg,
        tag("div", *keys),
        about="Relative RMS error of the latents that the denoiser is given.",
    )
