"""One row of the matrix: quantize a tiny model, run it, save it, load it, compare. Every answer has a truth of its own.

found: layers that the report lists, against a count by hooks of what a float run calls. same: the packed model against its float twin whose
weights are the packed ones' values, which must agree to rounding: a layer whose weight the model reads some other way would show here.
saved: every tensor and the output after save and load, bit for bit. SQNR: the output against the float model's, in dB, for 4-bit weights
(w4a16) and for 4-bit weights and activations (w4a4).
"""

__all__ = ["FLOOR_DB", "SAME_DB", "Row", "check", "flat", "markdown", "sqnr"]

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import qgen
from qgen.calibration.base import Call
from qgen.io.float_layers import dequantize
from qgen.nn.packed import Packed

# Rounding to nearest leaves 20 dB in one layer, and random networks lose a few more from layer to layer.
FLOOR_DB = 10.0
SAME_DB = 50.0  # two ways of the same sums


@dataclass
class Row:
    """What was found of one class. `reason`: "" = passed."""

    name: str
    layers: int = 0
    packed: int = 0
    share: float = 0.0
    w4a16: float = math.nan
    w4a4: float = math.nan
    saved: bool = False
    reason: str = ""
    seconds: float = 0.0


def check(name: str, make: Callable[[], nn.Module], call: Call, recipe: str = "rtn-w4a16") -> Row:
    """The row of the model that `make()` gives. A failure of any step is the row's reason; nothing is raised.

    `make.complete = False`: a config alone does not make such a model, so that its checkpoint is loaded into another one.
    """
    row, start = Row(name), time.process_time()
    try:
        _fill(row, make, call, recipe)
    except Exception as error:  # the matrix goes on, and lists it
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    row.seconds = time.process_time() - start
    return row


def _fill(row: Row, make: Callable[[], nn.Module], call: Call, recipe: str) -> None:
    model = make()
    ran = _layers_that_run(model, call)
    want = flat(_run(model, call))
    if not want.numel() or not bool(torch.isfinite(want).all()) or not float(want.abs().max()):
        row.reason = "the float model's output is empty, zero or not finite"
        return
    packed = qgen.quantize(copy.deepcopy(model), recipe, calibration=[call], progress=False)
    listed = [r for r in packed.qgen_report if r["path"] != "(output)"]
    row.layers, row.packed = len(ran), sum(isinstance(m, Packed) for m in packed.modules())
    four = sum(r["bytes16"] for r in listed if _bits(r["spec"]) == 4)
    row.share = four / sum(2 * p.numel() for p in model.parameters())
    got = flat(_run(packed, call))
    row.w4a16 = sqnr(got, want)
    twin = sqnr(got, flat(_run(dequantize(copy.deepcopy(packed)), call)))
    row.w4a4 = sqnr(
        flat(_run(qgen.quantize(copy.deepcopy(model), "rtn-int4", calibration=[call], progress=False), call)), want
    )
    state = {n: t.clone() for n, t in packed.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        qgen.save(packed, folder)
        loaded = qgen.load(folder) if getattr(make, "complete", True) else qgen.load(folder, into=make())
        again = loaded.state_dict()
        row.saved = state.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in state.items())
        # The bits are the same; where tensors lie in memory, and with it the last bits of sums, may not be.
        row.saved = row.saved and sqnr(flat(_run(loaded, call)), got) > 80
    missing = ran - {r["path"] for r in listed}
    if missing:
        row.reason = f"{len(missing)} layers run and are not listed, {sorted(missing)[0]!r} first"
    elif not bool(torch.isfinite(got).all()):
        row.reason = "output not finite"
    elif twin < SAME_DB:
        row.reason = f"the packed model and its dequantized twin agree to {twin:.0f} dB only"
    elif not row.saved:
        row.reason = "loaded model differs"
    elif row.w4a16 < FLOOR_DB:
        row.reason = f"SQNR {row.w4a16:.1f} dB, wanted {FLOOR_DB:.0f}"


def _layers_that_run(model: nn.Module, call: Call) -> set[str]:
    """Paths of matrix layers that one run calls, found by replacing `forward`: independent of the probe's hooks."""
    ran: set[str] = set()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {
        path: m
        for path, m in model.named_modules()
        if (isinstance(m, kinds) and not _exempt(m)) or type(m).__name__ == "Conv1D"
    }

    def noted(path: str, forward: Callable) -> Callable:
        return lambda *args, **kwargs: (ran.add(path), forward(*args, **kwargs))[1]

    for path, layer in layers.items():
        layer.forward = noted(path, layer.forward)
    try:
        _run(model, call)
    finally:
        for layer in layers.values():
            del layer.forward
    return ran


def _exempt(layer: Any) -> bool:
    """Depthwise and grouped convolutions, other paddings than zeros, and paddings given as text stay float by design."""
    padding = getattr(layer, "padding", 0)
    return (
        getattr(layer, "groups", 1) != 1
        or isinstance(padding, str)
        or getattr(layer, "padding_mode", "zeros") != "zeros"
    )


def _run(model: nn.Module, call: Call) -> Any:
    torch.manual_seed(0)  # some models draw noise, or hash, inside
    with torch.no_grad():
        return call.run(model)


def flat(output: Any) -> Tensor:
    """All float tensors of an output, nested or not, one after the other; (n,) float64."""
    if isinstance(output, Tensor):
        return output.detach().double().flatten() if output.is_floating_point() else torch.empty(0, dtype=torch.float64)
    if isinstance(output, dict):
        output = list(output.values())
    parts = (
        [flat(v) for v in output if isinstance(v, (Tensor, dict, tuple, list))]
        if isinstance(output, (tuple, list))
        else []
    )
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def sqnr(got: Tensor, want: Tensor) -> float:
    """10 log₁₀ of signal over error, at most 200."""
    return 10 * math.log10(
        max(float(want.square().sum()), 1e-30)
        / max(float((got - want).square().sum()), 1e-20 * float(want.square().sum()))
    )


def _bits(spec: str) -> int:
    from qgen import formats

    return 16 if spec == "float" else formats.get(spec.split(" x ")[0]).element.bits


def markdown(title: str, rows: list[Row]) -> str:
    """A table of rows and a line that counts them."""
    good = sum(not row.reason for row in rows)
    lines = [f"## {title}", "", f"{good} of {len(rows)} pass ({good / max(1, len(rows)):.0%}).", ""]
    lines += [
        "| class | layers | packed | 4-bit share | w4a16 dB | w4a4 dB | save and load | |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for r in rows:
        numbers = (
            f"{r.layers} | {r.packed} | {r.share:.0%} | {r.w4a16:.1f} | {r.w4a4:.1f} | {'equal' if r.saved else 'no'}"
        )
        lines.append(f"| {r.name} | {numbers} | {r.reason or 'pass'} |")
    return "\n".join(lines) + "\n"
