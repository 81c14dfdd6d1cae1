"""How much each layer's rounding costs at each step of sampling.

The 16-bit denoiser runs on recorded calls. Wherever one of its layers runs, the 4-bit layer of the same name gets the same input:

    error(layer, step) = Σ ‖y₄ − y‖² / Σ ‖y‖²          in dB: 10 log10; −20 dB is one tenth of the output's size, RMS

So this is the layer's own error, without what earlier layers have done to its input.
"""

__all__ = ["errors_by_step"]

import math
from collections.abc import Callable, Sequence
from typing import Any

_NOTHING = -120.0  # dB of a layer without any error
_COLUMNS = 12


def errors_by_step(
    before: Any, after: Any, calls: Sequence[Any], progress: Callable[[str, float, float], None]
) -> dict[str, Any]:
    """{"steps": labels, "layers": paths, "db": one list per layer}; None where a layer did not run at a step.

    Calls are sorted by their step into at most twelve columns; a label is the mean timestep of its calls, or the step's number.
    """
    import torch

    from qgen.nn.packed import Packed

    packed = {path: layer for path, layer in after.named_modules() if isinstance(layer, Packed)}
    steps = sorted({call.moment.step for call in calls})
    columns = min(_COLUMNS, len(steps))
    column = {step: index * columns // len(steps) for index, step in enumerate(steps)}
    lost, energy = ({path: [0.0] * columns for path in packed} for _ in range(2))
    now = 0

    def listener(path: str) -> Callable:
        def heard(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
            error = packed[path](*args, **kwargs).float() - output.float()
            lost[path][now] += float(error.square().sum())
            energy[path][now] += float(output.float().square().sum())

        return heard

    handles = [before.get_submodule(path).register_forward_hook(listener(path), with_kwargs=True) for path in packed]
    try:
        with torch.no_grad():
            for number, call in enumerate(calls):
                progress("measuring layers by timestep", number, len(calls))
                now = column[call.moment.step]
                call.run(before)
    finally:
        for handle in handles:
            handle.remove()
    names = [_label([call.moment for call in calls if column[call.moment.step] == index]) for index in range(columns)]
    table = {path: [_db(a, b) for a, b in zip(lost[path], energy[path], strict=True)] for path in packed}
    kept = [path for path in packed if any(value is not None for value in table[path])]
    return {"steps": names, "layers": kept, "db": [table[path] for path in kept]}


def _db(lost: float, energy: float) -> float | None:
    if energy <= 0:
        return None
    return round(10 * math.log10(lost / energy), 2) if lost > 0 else _NOTHING


def _label(moments: list[Any]) -> str:
    times = [moment.t for moment in moments]
    if all(t is not None for t in times):
        mean = sum(times) / len(times)
        return f"{mean:.0f}" if mean >= 10 else f"{mean:.2g}"
    return f"step {moments[0].step + 1}"
