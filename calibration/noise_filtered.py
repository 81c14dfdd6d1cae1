r"""Which scenes to calibrate with: those that are no outliers, and of these some of each kind. QuantVGGT's noise-filtered diverse sampling.

    1. score of a scene = ‖z‖, z = means and deviations of chosen layers' outputs, standardized over scenes
       (around the median, in units of the median deviation: outliers must not set the yardstick that they are held to)
    2. scenes with a score above Q3 + 1.5 (Q3 - Q1) are dropped
    3. the rest is clustered by how much later frames resemble the first one, and every cluster gives its share

For models without a timestep, whose calibration sets come from the world. What an odd scene spoils are ranges that are fixed beforehand, of
layers that read what no norm has bounded. Behind a norm, and with a scale measured for each token, it spoils nothing: one corrupted scene
among six moved the errors of such a model's W4A4 by -22 … +9 %, in no direction (`tests/methods/test_vggt.py` has both cases). For the
same reason norms' outputs alone tell little: of four corrupted scenes among forty, two or three were missed by them.
Feng et al., 2025, https://arxiv.org/abs/2509.21302
"""

__all__ = ["Sampling", "kmeans", "noise_filtered", "outliers"]

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet
from qgen.calibration.recorder import as_calls


@dataclass(frozen=True)
class Sampling:
    """What was chosen: the calls, their indices in the given ones, the indices dropped as noise, and every call's score."""

    calls: CalibrationSet
    chosen: tuple[int, ...]
    dropped: tuple[int, ...]
    scores: Tensor


def noise_filtered(
    module: nn.Module,
    scenes: object,
    layers: Sequence[str],
    count: int = 20,
    clusters: int = 5,
    frames: int = 1,
    seed: int = 0,
) -> Sampling:
    """Chooses `count` of `scenes`, one call each.

    Arguments:
        module: the model, in float. scenes: what `qgen.quantize` takes as calibration. layers: paths of modules whose outputs tell scenes
        apart: the first ones, which no norm has touched (the patch embedding), and deep ones (VGGT: norm1 of the last blocks). The last
        one's output also tells kinds: (…, C) in `frames` equal parts along its rows. frames: of a scene; 1 = kinds are told by the
        statistics themselves. seed: of the clustering.

    ValueError for no layers, fewer scenes than `count`, or an output that does not divide into frames.
    """
    given = as_calls(scenes)
    if not layers or count < 1 or len(given.calls) < count:
        raise ValueError(
            f"choosing {count} scenes wants as many and at least one layer, found {len(given.calls)} and {len(layers)}"
        )
    facts, kinds = _look(module, given, layers, frames)
    scores, dropped = outliers(facts)
    left = [i for i in range(len(facts)) if not dropped[i]]
    if len(left) < count:
        left = scores.argsort()[:count].sort().values.tolist()
    features = kinds[left] if frames > 1 else _standard(facts)[left]
    label = kmeans(features, min(clusters, len(left)), seed)
    chosen = sorted(left[i] for i in _shares(features, label, count))
    calls = CalibrationSet(
        tuple(given.calls[i] for i in chosen), f"{given.origin}: {count} of {len(facts)}, noise filtered"
    )
    return Sampling(calls, tuple(chosen), tuple(dropped.nonzero().flatten().tolist()), scores)


def outliers(facts: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n,) of rows of statistics (n, F), and which are beyond the upper fence."""
    scores = _standard(facts).norm(dim=1)
    low, high = torch.quantile(scores, torch.tensor([0.25, 0.75]))
    return scores, scores > high + 1.5 * (high - low)


def _standard(facts: Tensor) -> Tensor:
    centre = facts.median(0).values
    spread = (facts - centre).abs().median(0).values
    return (facts - centre) / spread.clamp_min(1e-6 * centre.abs().clamp_min(1e-6))


def _look(module: nn.Module, given: CalibrationSet, layers: Sequence[str], frames: int) -> tuple[Tensor, Tensor]:
    """Statistics (n, 2 · layers) and, per scene, each frame's resemblance to the first (n, frames)."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.get_submodule(path).register_forward_hook(
            lambda m, a, out, path=path: seen.__setitem__(path, out.float())
        )
        for path in layers
    ]
    facts, kinds = [], []
    try:
        for call in given.calls:
            seen.clear()
            with torch.no_grad():
                call.run(module)
            facts.append(torch.stack([f for path in layers for f in (seen[path].mean(), seen[path].std())]))
            rows = seen[layers[-1]].flatten(0, -2)
            if len(rows) % frames:
                raise ValueError(f"{layers[-1]}: its output has {len(rows)} rows, which are not {frames} frames")
            parts = rows.unflatten(0, (frames, -1))
            kinds.append(F.cosine_similarity(parts, parts[:1], dim=-1).mean(1))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(facts).cpu(), torch.stack(kinds).cpu()


def kmeans(x: Tensor, k: int, seed: int = 0, restarts: int = 20, rounds: int = 50) -> Tensor:
    """Labels (n,) of the best of `restarts` clusterings of x (n, F) around k centres; centres start at rows far apart."""
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(x), dtype=torch.long), float("inf")
    for _ in range(restarts):
        picks = [int(torch.randint(len(x), (1,), generator=generator))]
        while len(picks) < k:
            near = torch.cdist(x, x[picks]).amin(1).square()
            picks.append(int(torch.multinomial(near + 1e-12, 1, generator=generator)))
        centres = x[picks]
        for _ in range(rounds):
            label = torch.cdist(x, centres).argmin(1)
            new = torch.stack([x[label == j].mean(0) if bool((label == j).any()) else centres[j] for j in range(k)])
            if torch.equal(new, centres):
                break
            centres = new
        cost = float(torch.cdist(x, centres).amin(1).square().sum())
        if cost < least:
            best, least = torch.cdist(x, centres).argmin(1), cost
    return best


def _shares(x: Tensor, label: Tensor, count: int) -> list[int]:
    """`count` rows, taken from the clusters in turn, those nearest to a cluster's centre first."""
    queues = []
    for j in label.unique().tolist():
        mine = (label == j).nonzero().flatten()
        queues.append(mine[(x[mine] - x[mine].mean(0)).norm(dim=1).argsort()].tolist())
    chosen: list[int] = []
    while len(chosen) < count:
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen
