r"""Timeline: from a scheduler's timestep to the log signal-to-noise ratio, the scale on which sampling moves evenly.

    variance-preserving (DDPM family):  log-SNR = log ᾱ_t / (1 − ᾱ_t)
    flow matching:                      x_t = (1 − σ) x_0 + σ ε,  σ = t / T:  log-SNR = 2 log (1 − σ) / σ

Timesteps differ between schedulers in number and place, never in meaning: they are what the denoiser was trained to be told.
Kingma et al., 2021, https://arxiv.org/abs/2107.00630
"""

__all__ = ["GOLDEN", "log_snr", "unit_of"]

import math
from collections.abc import Iterable
from typing import Any

GOLDEN = 0.618034  # its multiples, without their whole parts, never crowd: offsets that differ from each to the next
LIMIT = 14.0  # where |log-SNR| is cut off: pure noise and pure signal are infinitely far away


def unit_of(ts: Iterable[float | None]) -> float:
    """T: 1 where a denoiser is told times in [0, 1], else 1000."""
    return 1.0 if max((t for t in ts if t is not None), default=0.0) <= 1.0 else 1000.0


def log_snr(scheduler: Any, t: float, unit: float = 1000.0) -> float | None:
    """Log-SNR, natural logarithm, within ±14, at timestep t of `unit`; None for a scheduler whose noise is not known from its config."""
    config = dict(getattr(scheduler, "config", None) or {})
    flow = (
        type(scheduler).__name__.startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )
    if flow:
        sigma = min(max(t / unit, 1e-9), 1 - 1e-9)
        return _limited(2 * math.log((1 - sigma) / sigma))
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or not len(table):
        return None
    index = min(max(round(t / unit * len(table)) if unit == 1.0 else round(t), 0), len(table) - 1)
    kept = min(max(float(table[index]), 1e-9), 1 - 1e-9)
    return _limited(math.log(kept / (1 - kept)))


def _limited(x: float) -> float:
    return min(max(x, -LIMIT), LIMIT)
