r"""Two kinds of layers, two metrics, two budgets: MixDQ's metric-decoupled allocation.

Cross-attention and MLPs change *what* a picture shows, the others *how well* it is drawn, and no single number ranks both. So each group
is allocated by its own metric under its own share of the budget, and the share is found by trying. With r = weights(content) /
weights(structure) and a factor k, an average cost of b per weight splits into

    b_structure = b (1 + r) / (k r + 1),        b_content = k b_structure

Every k of a grid gives one mixture; each is simulated, and the one whose pictures are nearest to the 16-bit model's wins. Multiplying one
group's damages by any number changes nothing, which no single-metric allocation can say.
Zhao et al., 2024, https://arxiv.org/abs/2405.17873 · groups by type of layer also in ViDiT-Q, https://arxiv.org/abs/2406.02540
"""

__all__ = ["CONTENT", "FACTORS", "decoupled", "is_content", "mixtures"]

import fnmatch
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgen.allocate.milp import Limit, choose
from qgen.allocate.sensitivity import Unit

CONTENT = ("*attn2*", "*cross_attn*", "*.ff.*", "*.ff_context.*", "*.ffn.*", "*.mlp.*", "*add_?_proj*")
FACTORS = tuple(0.46 + 0.1 * i for i in range(10))


def is_content(unit: Unit) -> bool:
    """Whether a unit belongs to the group that decides what a picture shows: it reads text, or is part of an MLP."""
    return any(s.role == "context" or any(fnmatch.fnmatchcase(s.path, p) for p in CONTENT) for s in unit.sites)


def mixtures(
    structure: Tensor,
    content: Tensor,
    member: Tensor,
    weights: Tensor,
    limit: Limit,
    factors: Sequence[float] = FACTORS,
    more: Sequence[Limit] = (),
) -> list[list[int]]:
    """The distinct choices that the factors give, without those that no choice can meet.

    Arguments:
        structure, content: (L, C) damages by the two metrics.
        member: (L,) bool, which layers are of the content group. weights: (L,) weights of each layer.
        limit: of a cost that grows with the number of weights, such as bits.
        more: other limits, of which each group gets the share that its layers could cost at most.
    """
    if not bool(member.any()) or bool(member.all()):  # one group alone: nothing to share
        return [choose(content if bool(member.all()) else structure, [limit, *more])]
    large, small = float(weights[member].sum()), float(weights[~member].sum())
    ratio, average = large / small, limit.most / (large + small)
    found: list[list[int]] = []
    for k in factors:
        share = average * (1 + ratio) / (k * ratio + 1)
        try:
            parts = {
                True: choose(
                    content[member], [Limit(limit.cost[member], k * share * large, limit.label), *_shared(more, member)]
                ),
                False: choose(
                    structure[~member],
                    [Limit(limit.cost[~member], share * small, limit.label), *_shared(more, ~member)],
                ),
            }
        except ValueError:
            continue  # this share is below what its group needs at least
        each = {kind: iter(part) for kind, part in parts.items()}
        mixed = [next(each[bool(kind)]) for kind in member]
        if mixed not in found:
            found.append(mixed)
    return found or [choose(structure, [limit, *more])]


def _shared(limits: Sequence[Limit], mask: Tensor) -> list[Limit]:
    """Limits of some of the layers."""
    share = lambda cost: float(cost[mask].amax(1).sum() / cost.amax(1).sum().clamp_min(1e-300))  # noqa: E731
    return [Limit(limit.cost[mask], limit.most * share(limit.cost), limit.label) for limit in limits]


def decoupled(found: Sequence[list[int]], score: Callable[[list[int]], float]) -> list[int]:
    """The mixture of the smallest simulated damage; `score` draws with it."""
    if len(found) == 1:
        return found[0]
    return found[int(torch.tensor([score(choice) for choice in found], dtype=torch.float64).argmin())]
