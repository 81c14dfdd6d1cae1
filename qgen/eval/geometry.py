"""Scores of geometry transformers such as VGGT: camera poses, depth maps and point maps of scenes.

    evaluate_geometry(predictions, truth)       # lists of scenes: {"poses": (S, 4, 4), "depth": (S, H, W), "points": (P, 3)}

Truth is what a data set measured, or the 16-bit model's own output: then the numbers are the loss from quantization. Each metric
is a file of its own and scores what both sides hold. Wang et al., 2025 (VGGT), https://arxiv.org/abs/2503.11651
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgen.errors import BadData
from qgen.eval.chamfer import chamfer
from qgen.eval.collect import collect
from qgen.eval.depth import abs_rel
from qgen.eval.metrics import Measured
from qgen.eval.pose import pose_auc, relative_errors
from qgen.eval.scores import Scores

__all__ = ["evaluate_geometry", "load_scene"]

Scene = Mapping[str, Tensor]
KEYS = ("poses", "depth", "points")
DEGREES = (30, 15, 5)


def evaluate_geometry(predictions: Sequence[Scene], truth: Sequence[Scene], *, seed: int = 0) -> Scores:
    """One row per metric whose data both sides hold; values per scene. ValueError if numbers of scenes differ or nothing is
    shared."""
    if len(predictions) != len(truth) or not predictions:
        raise ValueError(f"as many scenes as true ones wanted, found {len(predictions)} and {len(truth)}")
    shared = [key for key in KEYS if all(key in scene for scene in (*predictions, *truth))]
    pairs = list(zip(predictions, truth, strict=True))
    found: dict[str, Measured] = {}
    if "poses" in shared:
        errors = [torch.maximum(*relative_errors(p["poses"], t["poses"])) for p, t in pairs]
        for degrees in DEGREES:
            values = torch.tensor([pose_auc(e, degrees) for e in errors])
            found[f"pose_auc_{degrees}"] = Measured(f"pose AUC@{degrees}", "%", "higher", per_prompt=values)
    if "depth" in shared:
        values = torch.tensor([abs_rel(p["depth"], t["depth"]) for p, t in pairs])
        found["depth_abs_rel"] = Measured(
            "depth abs-rel", "", "lower", per_prompt=values, note="after one median scale per scene"
        )
    if "points" in shared:
        values = torch.tensor([chamfer(p["points"], t["points"]) for p, t in pairs])
        found["chamfer"] = Measured("point-map chamfer", "scene units", "lower", per_prompt=values)
    if not found:
        raise ValueError(f"nothing to compare: both sides need one of {', '.join(KEYS)} in every scene")
    return collect(found, len(pairs), seed=seed)


def load_scene(path: str | Path) -> dict[str, Tensor]:
    """A scene from a .npz file with any of poses (S, 4, 4), depth (S, H, W), points (..., 3); no pickles are read."""
    try:
        with np.load(path, allow_pickle=False) as data:
            found: dict[str, Any] = {key: torch.from_numpy(np.array(data[key])).double() for key in KEYS if key in data}
    except (OSError, ValueError, TypeError) as error:
        raise BadData(f"{path} is no .npz file of numbers: {error}") from error
    if not found:
        raise ValueError(f"{path} holds none of {', '.join(KEYS)}")
    if "points" in found:
        found["points"] = found["points"].reshape(-1, 3)
    return found
