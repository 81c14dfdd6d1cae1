"""A float file to a stream of parts: each weight is read, renamed, rounded and dropped before the next one is read.

Which layers there are comes from the model built without memory, where its config is known, else from names and shapes: then matrices
called *.weight are linear layers but for tables of embeddings, and a layer is inside a block if its path has a number under which several
lie. Large weights are rounded some rows at a time, which gives the same codes: scales are fixed before.
"""

__all__ = ["quantized", "rounded"]

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qgen import formats
from qgen.errors import BadCheckpoint, BadData
from qgen.formats.base import NumberFormat, QTensor
from qgen.io import onthefly, skeleton
from qgen.io.keys import Plan
from qgen.io.keys.deferred import sources, value
from qgen.io.onthefly import Step
from qgen.io.parts import Parts, Reported
from qgen.io.peers.base import Layer, Plain, Source
from qgen.io.peers.source import nbytes
from qgen.recipe import Recipe
from qgen.site import Draft, Site

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
_TABLES = ("embedding", "embeddings", "embed_tokens", "wte", "wpe", "shared", "relative_attention_bias")
_AT_ONCE = 1 << 22  # weights that are rounded together
_KEPT = 256 << 20  # bytes of stored tensors kept at most for further expressions that read them


def quantized(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    skip: tuple[str, ...] = (),
    progress: Callable[[int], None] | None = None,
) -> Parts:
    """The parts of a float file after data-free quantization.

    Arguments:
        source: the file; tensors of 8-bit floats without scales count as floats.
        plan: names to give, of `qgen.io.keys.plan`.
        skip: globs of paths that stay float, on top of the recipe's rules.
        progress: is told the number of bytes of each stored tensor when it has been read for the first time.

    Raises ValueError at once for a recipe that wants activations, BadCheckpoint if the file does not fit its config; BadData on the way if
    a weight is not finite.
    """
    recipe = recipe.skip(*skip) if skip else recipe
    onthefly.require_data_free(recipe)
    model = _skeleton(plan, source)
    steps = _steps_by_name(plan, recipe) if model is None else onthefly.steps(model, recipe)
    steps = {path: step for path, step in steps.items() if _float(plan.tensors.get(f"{path}.weight"))}
    if not steps:
        raise ValueError(f"recipe {recipe.name!r} keeps every layer of {source.where} float: nothing to do")
    return Parts(_parts(source, plan, steps, progress), 4 * len(plan.tensors))


def _parts(
    source: Source, plan: Plan, steps: dict[str, Step], progress: Callable[[int], None] | None
) -> Iterator[Layer | Plain]:
    dtype = _dtype(source)
    read = _Reader(source, plan, progress)
    for name, tensor in plan.tensors.items():
        path, _, leaf = name.rpartition(".")
        if path in steps and leaf == "weight":
            bias = plan.tensors.get(f"{path}.bias")
            offsets = None if bias is None else read.value(bias)
            yield rounded(read.value(tensor), offsets, steps[path], _layer_dtype(tensor, dtype))
        elif path not in steps or leaf != "bias":
            eight = tensor.dtype in _EIGHT
            made = read.value(tensor)
            yield Plain(name, made.to(dtype) if eight else made, "widened from 8 bits" if eight else "")


def rounded(weight: Tensor, bias: Tensor | None, step: Step, dtype: torch.dtype) -> Reported:
    """One layer, quantized as `qgen.io.onthefly.quantize` does it, in little memory, with its row of the report.

    weight: (N, K) or (N, C, kh, kw) floats. bias: (N,) or None. dtype: in which the layer computes. BadData if the weight is not finite.
    """
    from qgen.methods.base import Stats, refine, sqnr_db
    from qgen.nn.linear import slots_of
    from qgen.nn.packed import Layout

    site, spec = step.site, step.spec
    shape, flat = tuple(weight.shape), weight.flatten(1)
    if flat.dtype in _EIGHT:
        flat = flat.to(dtype)
    if not torch.isfinite(flat).all():
        raise BadData(
            f"the weight of {site.path!r} holds NaN or infinity; the file is damaged or overflowed when it was cast"
        )
    if spec.methods:
        draft = refine(Draft((site,), spec, flat.float()), Stats())
        if draft.shift is not None:
            raise ValueError(
                f"{site.path!r}: a method shifts the input, which needs the bias; call qgen.quantize on the model"
            )
        slots, rank, hadamard, log = (
            slots_of(draft, 0, dtype),
            0 if draft.down is None else len(draft.down),
            draft.hadamard,
            draft.log,
        )
    else:
        slots, rank, hadamard, log = _nearest(flat, spec.weight, spec.act), 0, 0, {}
    if bias is not None:
        slots["bias"] = bias.to(dtype)
    layout = Layout(
        spec.weight, spec.act or "", rank, hadamard, tuple(s for s in slots if s not in ("codes", "scales"))
    )
    layer = Reported(site.path, shape, layout, slots, dtype)
    quality = round(sqnr_db(_lost(layer, flat)), 2)
    row = {
        "path": site.path,
        "kind": site.kind,
        "block": site.block,
        "role": site.role,
        "shape": list(site.shape),
        "spec": str(spec),
        "nbytes": sum(t.nbytes for t in slots.values()),
        "bytes16": 2 * (flat.numel() + (0 if bias is None else bias.numel())),
        "why": step.why,
        "weight_sqnr_db": quality,
        "log": {**log, "weight_sqnr_db": quality},
    }
    return Reported(site.path, shape, layout, slots, dtype, "", row)


def _nearest(flat: Tensor, weight: str, act: str | None) -> dict[str, Tensor]:
    """The slots of a weight (N, K) rounded to nearest."""
    fmt = formats.get(weight)
    kp = formats.padded(flat.shape[1], weight, act)
    target = nn.functional.pad(flat.float(), (0, kp - flat.shape[1])) if kp > flat.shape[1] else flat.float()
    if type(fmt).quantize is not NumberFormat.quantize or target.numel() <= _AT_ONCE:
        q = fmt.quantize(target)
    else:
        scales, global_scale, zero = fmt.ranges(target)
        pieces = []
        for rows in _slices(target):
            top = global_scale if global_scale is None or not global_scale.ndim else global_scale[rows]
            like = QTensor(scales[:0], scales[rows], top, None if zero is None else zero[rows], weight)
            pieces.append(fmt.quantize(target[rows], like=like).codes)
        q = QTensor(torch.cat(pieces), scales, global_scale, zero, weight)
    slots = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale, "zero": q.zero}
    return {name: t.contiguous() for name, t in slots.items() if t is not None}


def _lost(layer: Layer, flat: Tensor) -> float:
    """Squared error of a layer's weight, relative to its energy; some rows at a time."""
    from dataclasses import replace

    from qgen.io.peers.floats import dequantized

    lost = energy = 0.0
    by_row = ("codes", "scales", "zero", "up", "bias")
    for rows in _slices(flat):
        want = flat[rows].float()
        slots = {n: t[rows] if n in by_row or (n == "global_scale" and t.ndim) else t for n, t in layer.slots.items()}
        got, _ = dequantized(replace(layer, shape=tuple(want.shape), slots=slots))
        lost += float((got - want).square().sum())
        energy += float(want.square().sum())
    return lost / max(energy, 1e-30)


def _slices(t: Tensor) -> list[slice]:
    step = max(1, _AT_ONCE // max(1, t.shape[1]))
    return [slice(start, start + step) for start in range(0, t.shape[0], step)]


class _Reader:
    """Reads stored tensors, keeps those that other expressions read too until the last has, and tells progress."""

    def __init__(self, source: Source, plan: Plan, progress: Callable[[int], None] | None):
        self.source, self.progress = source, progress
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.left = Counter(name for tensor in plan.tensors.values() for name in sources(tensor))
        self.seen: set[str] = set()

    def __call__(self, name: str) -> Tensor:
        if name in self.kept:
            return self.kept[name]
        need = nbytes(self.source.shapes[name], self.source.dtypes[name])
        while self.kept and sum(t.nbytes for t in self.kept.values()) + need > _KEPT:
            self.kept.popitem(last=False)
        tensor = self.source.read(name)
        if self.left[name] > 1 and need <= _KEPT:
            self.kept[name] = tensor
        if self.progress and name not in self.seen:
            self.progress(need)
        self.seen.add(name)
        return tensor

    def value(self, tensor: Tensor) -> Tensor:
        """What a deferred tensor stands for; each is asked for once."""
        made = value(tensor, self)
        for name in sources(tensor):
            self.left[name] -= 1
            if not self.left[name]:
                self.kept.pop(name, None)
        return made


def _skeleton(plan: Plan, source: Source) -> nn.Module | None:
    """The model on meta, if its config is known. BadCheckpoint if the file lacks one of its tensors or has it in another shape."""
    config = plan.config
    names = config.get("architectures")
    package, name = (
        ("diffusers", config.get("_class_name")) if "_class_name" in config else ("transformers", names and names[0])
    )
    if not name:
        return None
    import importlib

    library = importlib.import_module(package)
    base = library.ModelMixin if package == "diffusers" else library.PreTrainedModel
    kind = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, base):
        raise BadCheckpoint(f"{source.where}: {package} has no model class {str(name)[:80]!r}")
    try:
        with skeleton.without_memory():
            model = kind.from_config(config) if package == "diffusers" else kind(kind.config_class.from_dict(config))
    except Exception as error:  # a config of a stranger may fail in any line of a model's constructor
        raise BadCheckpoint(
            f"{source.where}: no {name} can be built from its config: {type(error).__name__}: {error}"
        ) from error
    for key, wanted in model.state_dict().items():
        found = plan.tensors.get(key)
        if found is None and key not in dict(model.named_parameters()):
            continue  # a buffer or a tied name that files may leave out
        if found is None or tuple(found.shape) != tuple(wanted.shape):
            told = "is not in the file" if found is None else f"has the shape {tuple(found.shape)} in the file"
            raise BadCheckpoint(f"{source.where}: {name} wants {key!r} of shape {tuple(wanted.shape)}, which {told}")
    return model


def _steps_by_name(plan: Plan, recipe: Recipe) -> dict[str, Step]:
    """What to quantize, judged by names and shapes."""
    paths = {
        name[: -len(".weight")]: tuple(t.shape)
        for name, t in plan.tensors.items()
        if name.endswith(".weight") and t.ndim == 2 and _float(t)
    }
    under: dict[str, int] = {}
    for path in paths:
        for block in _numbered(path)[:1]:
            under[block] = under.get(block, 0) + 1
    several = any(count > 1 for count in under.values())
    found = {}
    for order, (path, shape) in enumerate(paths.items()):
        if path.rpartition(".")[2] in _TABLES or 0 in shape:
            continue
        block = next((b for b in _numbered(path)[:1] if under[b] > 1), "")
        role = "inside" if block or not several else "outside"
        site = Site(path, "linear", block, order, path, (shape[0], math.prod(shape[1:])), role=role)
        spec, why = recipe.resolve(site)
        if spec is not None:
            found[path] = Step(site, spec, why)
    return found


def _numbered(path: str) -> list[str]:
    """Prefixes of a path that end in a number, shortest first."""
    words = path.split(".")
    return [".".join(words[: i + 1]) for i, word in enumerate(words) if word.isdigit() and i]


def _float(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dtype in (*_FLOATS, *_EIGHT)


def _dtype(source: Source) -> torch.dtype:
    """The float dtype of most tensors; bfloat16 where all are narrower."""
    counts: dict[torch.dtype, int] = {}
    for dtype in source.dtypes.values():
        if dtype in _FLOATS[:3]:
            counts[dtype] = counts.get(dtype, 0) + 1
    return max(counts, key=counts.__getitem__, default=torch.bfloat16)


def _layer_dtype(weight: Tensor, usual: torch.dtype) -> torch.dtype:
    return weight.dtype if weight.dtype in _FLOATS[:3] else usual
