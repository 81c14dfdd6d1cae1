r"""Tables of temporal features: per module, what a quantized layer computes or what the float one gave, looked up, whichever is nearer.

A schedule has few timesteps, so that what a module makes of them fits a table, in few bits too. For each module that the timestep alone
decides,

    computed   Σ_t ‖Q(m)(t) − m(t)‖² / Σ_t ‖m(t)‖²        the quantized module of the denoiser, with all before it quantized
    table      Σ_t ‖Q(m(t)) − m(t)‖² / Σ_t ‖m(t)‖²        the float module's outputs, rounded, with a scale for each timestep

and the smaller one serves from then on; at timesteps that the table has not, the module is computed.
Disturbance-aware selection and caching of temporal features: Huang et al., 2024, https://arxiv.org/abs/2407.19547
"""

__all__ = ["Choice", "settle"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgen.calibration.base import Call
from qgen.methods.modulation import ModulationCache, cache_modulation
from qgen.methods.modulation_curve import Table


@dataclass(frozen=True)
class Choice:
    """Relative squared errors of both ways."""

    computed: float
    table: float

    @property
    def error(self) -> float:
        """Of the one that serves."""
        return min(self.computed, self.table)


def settle(
    cache: ModulationCache, teacher: nn.Module, call: Call, timesteps: Tensor, numbers: str = "int8_row"
) -> dict[str, Choice]:
    """Chooses for every module of a quantized denoiser's cache that depends on the timestep alone; what each could have had.

    Arguments:
        teacher: the denoiser in float. call: a recorded one; both run it once for each of `timesteps` (n,), in the scheduler's units.
        numbers: format of the tables, with one scale for a row.

    Curves that the cache had are dropped, and what it stored is forgotten. NotQuantizable if no module depends on the timestep alone.
    """
    paths, t = cache.timed(), timesteps.double().unique()
    cache.curves = {}
    made = cache.outputs_at(call, paths, t)
    float_cache = cache_modulation(teacher, call)
    try:
        float_cache.timed()
        wanted = float_cache.outputs_at(call, paths, t)
    finally:
        float_cache.remove()
    found = {}
    for path in paths:
        tables = tuple(Table.fit(t, want, numbers) for want in wanted[path])
        rounded = [table(t) for table in tables]
        found[path] = Choice(_error(made[path], wanted[path]), _error(rounded, wanted[path]))
        if found[path].table < found[path].computed:
            cache.curves[path] = tables
    cache.clear()
    return found


def _error(got: list[Tensor], wanted: list[Tensor]) -> float:
    lost = sum(float((a - b).double().square().sum()) for a, b in zip(got, wanted, strict=True))
    return lost / max(sum(float(b.double().square().sum()) for b in wanted), torch.finfo(torch.float32).tiny)
