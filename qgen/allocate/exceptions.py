"""Exceptions: layers that may read their input at 16 bits although the recipe rounds it, the few that are hurt most by rounding it.

A budget counts weights, and 16-bit activations cost it nothing: left free, every layer would take them. So they are counted by a limit of
their own, a share of all numbers that the layers read. A layer that stays at 16 bits as a whole is an exception as well.
MixDQ keeps the 1 % most sensitive activations: Zhao et al., 2024, https://arxiv.org/abs/2405.17873
"""

__all__ = ["limit_of", "offering"]

from collections.abc import Callable
from dataclasses import replace

import torch

from qgen.allocate.milp import Limit
from qgen.allocate.sensitivity import Table, Unit
from qgen.recipe import Spec

Ladder = Callable[[Spec], tuple[Spec | None, ...]]


def offering(ladder: Ladder) -> Ladder:
    """The ladder with one more candidate: the recipe's own weights, and activations that stay float."""

    def steps(spec: Spec) -> tuple[Spec | None, ...]:
        return tuple(dict.fromkeys((*ladder(spec), *((replace(spec, act=None),) if spec.act else ()))))

    return steps


def limit_of(table: Table, share: float) -> Limit:
    """At most `share` of the activations of all units whose recipe rounds them may be exceptions."""
    cost = torch.zeros_like(table.bits)
    for i, unit in enumerate(table.units):
        for j, spec in enumerate(unit.candidates):
            if spec is None or spec.act is None:
                cost[i, j] = _reads(unit)
    return Limit(cost, share * sum(map(_reads, table.units)), f"16-bit activations in {share:.3g} of all")


def _reads(unit: Unit) -> float:
    """Numbers in the unit's input, 0 where the recipe itself leaves it float."""
    own = unit.candidates[0]
    return 0.0 if own is None or own.act is None else float(max(1, unit.sites[0].tokens) * unit.sites[0].shape[1])
