"""A twin of ComfyUI's model, quantized in waves by a recipe, with ComfyUI's progress bar and interruption.

The same waves as `qgen.quantize`: the recorded calls are replayed through the twin, whose earlier waves are packed already. Only the module
that replays are called on differs: it knows the device where ComfyUI wants inputs, since weights may wait elsewhere.
"""

__all__ = ["named_role", "needs_calls", "quantized_twin", "sites_of"]

import fnmatch
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qgen.nodes.clock import wind
from qgen.nodes.models import compute_dtype, exchange, settle, twin
from qgen.nodes.ops import adopt
from qgen.nodes.progress import Bars

# What one sees in ComfyUI's names and not in a model that nobody has run: layers with one row per sample, and the first convolution.
_VECTORS = (
    "*_mod.lin",
    "*modulation*",
    "*adaLN*",
    "*emb_layers.*",
    "time_embed.*",
    "label_emb.*",
    "*time_emb*",
    "*time_in.*",
    "*vector_in.*",
)
_TEXT = ("*attn2.to_k", "*attn2.to_v")
_OUTSIDE = ("input_blocks.0.*", "img_in", "txt_in")


def needs_calls(recipe: Any) -> bool:
    """Whether some method of the recipe reads statistics."""
    from qgen.site import Site

    site = Site("", "linear", "", 0, "", (64, 64))
    specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
    return any(method.needs(site) for spec in specs if spec for method in spec.methods)


def named_role(path: str) -> str:
    """The role of a layer as its name in ComfyUI tells it: "vector", "context", "outside", or "" for none of them."""
    roles = {"outside": _OUTSIDE, "vector": _VECTORS, "context": _TEXT}
    found = (
        role for role, patterns in roles.items() if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    )
    return next(found, "")


def sites_of(module: nn.Module, call: Any = None) -> list:
    """Sites of a diffusion model of ComfyUI's, in execution order if there is a call. A UNet's middle is a block as the others are."""
    from qgen.probe import probe, static_sites

    def role(site: Any) -> Any:
        named = named_role(site.path)
        if named == "outside":
            return replace(site, role=named)
        if site.path.startswith("middle_block."):
            site = replace(site, block="middle_block", role="inside" if site.role == "outside" else site.role)
        return replace(site, role=named) if call is None and named else site

    return [role(site) for site in (probe(module, call) if call is not None else static_sites(module))]


class _Placed(nn.Module):
    """A module that says where its inputs belong; everything else is the module's own."""

    def __init__(self, inner: nn.Module, device: torch.device):
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, dtype=torch.uint8, device=device), requires_grad=False)
        self.inner = inner

    def forward(self, *args, **kwargs) -> Any:
        return self.inner(*args, **kwargs)

    def get_submodule(self, path: str) -> nn.Module:
        return self.inner.get_submodule(path)

    def named_modules(self, *args, **kwargs):
        return self.inner.named_modules(*args, **kwargs)

    def parameters(self, recurse: bool = True):
        yield self.anchor  # first: replays put their inputs where it is
        yield from self.inner.parameters(recurse)


def quantized_twin(
    patcher: Any, recipe: Any, calls: Any = None, seed: int = 0, budget: Any = None
) -> tuple[Any, list[dict]]:
    """A model like the patcher's with packed layers, on its offload device, and the rows of the report.

    calls: a CalibrationSet, needed if the recipe reads statistics or there is a budget. budget: what `qgen.quantize` takes as `budget` and
    `quality`, None for none. NotQuantizable if the recipe keeps every layer float; BadData for weights or activations that are not finite;
    ValueError for budgets that cannot be met. Whatever is raised, the patcher's model is what it was.
    """
    from qgen.checks import check_weights, refuse_quantized
    from qgen.errors import NotQuantizable
    from qgen.methods.temporal import timed_or_blind

    refuse_quantized(patcher.model.diffusion_model, "model")
    model = twin(patcher)
    module, device = model.diffusion_model, patcher.load_device
    check_weights(module, "model")
    if _fits(module, device):
        module.to(device)
    elif budget is not None:
        raise ValueError(f"budget: layers are tried out in the float model, which does not fit on {device} as a whole")
    placed = _Placed(module, device)
    recipe = timed_or_blind(recipe, calls, type(module).__name__)
    sampling, model.model_sampling = model.model_sampling, patcher.get_model_object("model_sampling")
    with torch.no_grad():
        sites, record = sites_of(placed, calls.calls[0] if calls else None), None
        if budget is not None:
            recipe, record = _allocated(placed, sites, recipe, calls, budget, seed)
        chosen, kept = [], []
        for site in sites:
            spec, why = recipe.resolve(site)
            if spec is None:
                numel = sum(p.numel() for p in module.get_submodule(site.path).parameters())
                kept.append({**_facts(site), "spec": "float", "why": why, "nbytes": 2 * numel, "bytes16": 2 * numel})
            else:
                chosen.append((site, spec, why))
        if not chosen:
            raise NotQuantizable(
                f"recipe {recipe.name!r} keeps all {len(kept)} layers of this model float: nothing to do"
            )
        rows = _waves(placed, model, chosen, calls, seed, compute_dtype(model))
    settle(model, patcher.offload_device)
    model.model_sampling = sampling  # the patcher's own comes as its object patch
    wind(model)
    order = {path: i for i, (path, _) in enumerate(module.named_modules())}
    rows = sorted([*rows, *kept], key=lambda row: order[row["path"]])
    module.__dict__.update(qgen_recipe=recipe, qgen_report=rows)
    if record is not None:
        module.__dict__["qgen_allocation"] = record
    return model, rows


def _allocated(placed: Any, sites: list, recipe: Any, calls: Any, budget: Any, seed: int) -> tuple[Any, dict]:
    """The recipe with a rule for each layer that the budget gives another format, and how that came about."""
    from qgen.allocate import Budget, allocate

    limits = (budget, None) if isinstance(budget, Budget) else (None, budget)
    plans = allocate(placed, {"": placed}, recipe, {"": calls}, *limits, seed=seed, bar=Bars(), sites={"": sites})
    return plans[""].recipe, plans[""].record


def _waves(placed: Any, model: Any, chosen: list, calls: Any, seed: int, dtype: torch.dtype) -> list[dict]:
    from qgen.methods.base import Stats
    from qgen.nn import packed_layer
    from qgen.waves import Observed, Traffic, measure, plan, solve

    module, whys = model.diffusion_model, {site.path: why for site, _, why in chosen}
    total = sum(p.nbytes for p in module.parameters())
    waves = plan(
        [(site, spec) for site, spec, _ in chosen],
        max(512 << 20, total // 2),
        Traffic.of(module, calls) if calls else Traffic(),
    )
    bars, rows = Bars(), []
    device = placed.anchor.device
    with bars(total=sum(len(wave.groups) for wave in waves), desc="quantize") as bar:
        for number, wave in enumerate(waves):
            title = f"observe wave {number + 1} of {len(waves)}"
            stats = Observed({})
            if calls:
                stats = measure(placed, wave, calls, seed, lambda c, t=title: bars(c, desc=t, leave=False))
            for group in wave.groups:
                layers = [module.get_submodule(site.path) for site in group.sites]
                home = layers[0].weight.device
                for layer in layers:
                    layer.to(device)
                draft, error = solve(placed, group, stats.get(group.sites[0].shares, Stats()), seed)
                for index, (site, old) in enumerate(zip(group.sites, layers, strict=True)):
                    new = adopt(packed_layer(draft, old, index), dtype)
                    exchange(module, site.path, new.to(home))
                    numel = sum(p.numel() for p in old.parameters())
                    row = {**_facts(site), "spec": str(group.spec), "nbytes": new.nbytes, "bytes16": 2 * numel}
                    rows.append({**row, "why": whys[site.path], "log": dict(draft.log), **error})
                bar.update(1)
            wind(model)  # the next wave is observed behind layers that know the time
            stats = None
    return rows


def _facts(site: Any) -> dict:
    return {"path": site.path, "kind": site.kind, "block": site.block, "shape": list(site.shape), "role": site.role}


def _fits(module: nn.Module, device: torch.device) -> bool:
    """Whether the float model and as much again as a wave needs have room on the device."""
    from comfy.model_management import get_free_memory, is_device_cpu

    if is_device_cpu(device):
        return True
    return 1.5 * sum(p.nbytes for p in module.parameters()) < get_free_memory(device)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
