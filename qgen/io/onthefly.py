"""Data-free quantization of one layer at a time, while 16-bit weights stream in.

There is no forward pass, so sites know their path, shape and whether they lie in a repeated block; rules about inputs do not apply.
"""

__all__ = ["Step", "quantize", "require_data_free", "steps"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgen.errors import BadData
from qgen.io.config import DATA_FREE
from qgen.models import adapter_for
from qgen.nn import packed_layer
from qgen.nn.kinds import matrix
from qgen.nn.packed import Packed
from qgen.probe import static_sites
from qgen.recipe import Recipe, Spec
from qgen.site import Draft, Site


@dataclass(frozen=True)
class Step:
    """One layer to quantize: where, how, and why so."""

    site: Site
    spec: Spec
    why: str


def require_data_free(recipe: Recipe) -> None:
    """ValueError naming `qgen.quantize` if a method of the recipe needs recorded activations."""
    site = Site("layer", "linear", "", 0, "input", (1024, 1024))
    for spec in [recipe.default, *(rule.spec for rule in recipe.rules)]:
        wanting = [m.name for m in spec.methods if m.needs(site)] if spec else []
        if wanting or (spec and spec.bins > 1):
            what = f"{', '.join(wanting)} fits recorded activations" if wanting else f"it has {spec.bins} timestep bins"
            raise ValueError(
                f"recipe {recipe.name!r} cannot quantize while loading: {what}. Load the 16-bit model and call "
                f"qgen.quantize(pipe, recipe={recipe.name!r}), or choose a data-free recipe such as {DATA_FREE!r}"
            )


def steps(model: nn.Module, recipe: Recipe, skip: tuple[str, ...] = ()) -> dict[str, Step]:
    """What to quantize in a float model, by path. skip: paths (of layers or whole parts) that stay float."""
    keep = adapter_for(model).keep_float()
    recipe = recipe.skip(*keep, why="kept float in this family") if keep else recipe
    found: dict[str, Step] = {}
    for site in static_sites(model):
        if not any(site.path == s or site.path.startswith(s + ".") for s in skip):
            spec, why = recipe.resolve(site)
            if spec is not None:
                found[site.path] = Step(site, spec, why)
    return found


def quantize(layer: nn.Module, weight: Tensor, step: Step, dtype: torch.dtype) -> tuple[Packed, dict]:
    """A packed layer for `layer` with the float `weight`, on the weight's device; and its row of the report.

    The bias is taken over as it is, possibly still without data. BadData if the weight is not finite.
    """
    from qgen.methods.base import Stats, refine, sqnr_db

    path = step.site.path
    if not torch.isfinite(weight).all():
        raise BadData(
            f"the weight of {path!r} holds NaN or infinity; the file is damaged or overflowed when it was cast"
        )
    draft = refine(Draft((step.site,), step.spec, matrix(layer, weight).float()), Stats())
    if draft.shift is not None:
        raise ValueError(
            f"{path!r}: a method shifts the input, which needs the bias; call qgen.quantize on the loaded model"
        )
    packed = packed_layer(draft, layer, dtype=dtype)
    if layer.bias is not None:
        packed.bias = layer.bias.requires_grad_(False)
    wanted = matrix(layer, weight).float()
    lost = float(
        (packed.dequantize(torch.float32).flatten(1) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
    )
    row = {
        "path": path,
        "kind": step.site.kind,
        "shape": list(step.site.shape),
        "spec": str(step.spec),
        "kernel": None,
        "sqnr_db": None,
        "sqnr_fit_db": None,
        "nbytes": packed.nbytes,
        "bytes16": 2 * (weight.numel() + (0 if layer.bias is None else layer.bias.numel())),
        "why": step.why,
        "log": {**draft.log, "weight_sqnr_db": round(sqnr_db(lost), 2)},
    }
    return packed, row
