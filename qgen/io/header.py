"""What a checkpoint says about itself: versioned JSON in the free text of each safetensors file, under the key "qgen".

    {"format": 1, "qgen": version, "torch": version, "model": {"library", "class", "dtype"}, "recipe": {…}, "report": [rows],
     "layers": [{"path", "kind", layout…}], "tensors": {name: sha256}, "aliases": {name: name it is tied to},
     "buffers": {name: dtype of a buffer that files do not hold}, "attention": {…} or null, "sha256": of all the rest}

The digests tell damage from what was saved; they are no signature: who can rewrite the file can rewrite them.
"""

__all__ = [
    "KEY", "VERSION", "Header", "LayerEntry", "collect", "dtype_of", "header_of", "library", "note", "refuse_channel_scales", "verify",
]  # fmt: skip

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen import formats
from qgen.errors import BadCheckpoint, QgenError
from qgen.io.files import DTYPES, Files, digest, parse
from qgen.nn.attention import Choices
from qgen.nn.known import KNOWN
from qgen.nn.packed import COUNTS, STORED, Layout, Packed
from qgen.recipe import Recipe

KEY, VERSION = "qgen", 1
_KINDS = ("linear", "conv1d", "conv2d", "conv3d")
_MOST = 1 << 20  # ranks and Hadamard sizes beyond this are damage, not layers


@dataclass(frozen=True)
class LayerEntry:
    """One packed layer: where, of which kind, how its slots are laid out, and in which dtype it computes."""

    path: str
    kind: str
    layout: Layout
    dtype: torch.dtype


@dataclass(frozen=True)
class Header:
    """All that a loader must know beside the tensors. recipe, report: as on the quantized module, for people and for later steps."""

    layers: tuple[LayerEntry, ...]
    tensors: dict[str, str]
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None
    report: list[dict] = field(default_factory=list)
    attention: Choices | None = None

    def to_json(self) -> str:
        """One line of JSON that depends on the content alone."""
        layers = [
            {"path": e.path, "kind": e.kind, **e.layout.to_dict(), "dtype": str(e.dtype)[6:]} for e in self.layers
        ]
        data = {
            "format": VERSION,
            "qgen": _version(),
            "torch": torch.__version__,
            "model": self.model,
            "recipe": self.recipe and json.loads(self.recipe.to_json()),
            "layers": sorted(layers, key=lambda e: e["path"]),
            "report": self.report,
            "attention": self.attention and self.attention.to_dict(),
            "aliases": self.aliases,
            "buffers": self.buffers,
            "tensors": self.tensors,
        }
        data = json.loads(json.dumps(data, default=_plain))
        return _dumps({**data, "sha256": _sum(data)})


def note(module: nn.Module, state: dict[str, Tensor], prefix: str, local: dict) -> None:
    """A hook for `state_dict()`: what the header says about the module as a whole travels in the state dict's metadata.

    ValueError if a layer has activation scales that no format has.
    """
    if prefix:
        return
    for path, layer in module.named_modules():
        if isinstance(layer, Packed):
            refuse_channel_scales(path, layer)
    unsaved = {name: b for name, b in module.named_buffers() if name not in state and b.is_floating_point()}
    local["qgen_model"] = {
        "model": {"library": library(module), "class": type(module).__name__, "dtype": str(dtype_of(module))[6:]},
        "recipe": getattr(module, "qgen_recipe", None),
        "report": getattr(module, "qgen_report", None) or [],
        "attention": getattr(module, "qgen_attention", None),
        "buffers": {name: str(b.dtype)[6:] for name, b in sorted(unsaved.items())},
    }


def library(module: nn.Module) -> str:
    """Whose `save_pretrained` a module has: "diffusers", "transformers", or "torch" for none. Imports nothing."""
    bases = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__}
    known = {("diffusers", "ModelMixin"), ("transformers", "PreTrainedModel")}
    return next((name for name, _ in sorted(bases & known)), "torch")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The float dtype that most of a module's layers compute in."""
    seen: dict[torch.dtype, int] = {}
    for child in module.modules():
        dtypes = (
            [child.compute_dtype] if isinstance(child, Packed) else [p.dtype for p in child.parameters(recurse=False)]
        )
        for dtype in filter(lambda d: d.is_floating_point and d.itemsize > 1, dtypes):
            seen[dtype] = seen.get(dtype, 0) + 1
    return max(seen, key=seen.__getitem__, default=torch.float32)


def refuse_channel_scales(path: str, layer: Packed) -> None:
    """ValueError where a layer has other than its format's static activation scales: one for each of its inputs, say."""
    if layer.act_scale is None:
        return
    count, layout = layer.act_scale.numel(), layer.layout
    kp = formats.padded(layer.k, layout.weight, layout.act, multiple=layout.hadamard or 1)
    blocks = kp // (formats.get(layout.act).block or kp) if layout.act else 1
    if count != blocks:
        raise ValueError(
            f"{path!r} has {count} activation scales, {layout.act} has {blocks} for {layer.k} inputs: scales for each input lie on the "
            "axis that is summed over, where no product of codes can take them; fold them into the weight, as smoothing"
        )


def collect(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Header]:
    """A module's `state_dict()`, made with `note` as a hook, to what files hold: tensors without placeholders, shared ones once; a header.

    Raises ValueError if LoRA adapters are attached, QgenError if parts of the module are offloaded.
    """
    for name in state:
        if ".lora_A." in name or ".base_layer." in name:
            raise ValueError(
                "LoRA adapters are attached: call unload_lora_weights(), or qgen.fuse_lora(pipe) before it, and save then"
            )
    described = {path: data["qgen"] for path, data in getattr(state, "_metadata", {}).items() if "qgen" in data}
    placeholders = {f"{path}.weight" if path else "weight" for path in described}
    kept: dict[str, Tensor] = {}
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if name in placeholders or not isinstance(tensor, Tensor):
            continue
        if tensor.device.type == "meta":
            raise QgenError(f"{name!r} is offloaded and has no data here: remove offloading hooks, then save")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        shared = tensor.numel() and first.setdefault(key, name) != name
        if shared and name.rpartition(".")[0] in described:
            kept[name] = tensor.clone()  # one packed layer under two paths: each has its own slots in the file
        elif shared:
            aliases[name] = first[key]
        else:
            kept[name] = tensor
    layers = tuple(_entry({"path": path, **data}, "this model") for path, data in sorted(described.items()))
    sums = {name: digest(kept[name]) for name in sorted(kept)}
    return kept, Header(layers, sums, aliases, **state._metadata[""]["qgen_model"])


def header_of(files: Files, where: Path) -> Header:
    """The header of a scanned checkpoint, checked against what its files hold. BadCheckpoint with one line if anything is off."""
    texts = {path: metadata.get(KEY) for path, metadata in files.metadata.items()}
    if None in texts.values():
        path = next(path for path, text in texts.items() if text is None)
        raise BadCheckpoint(f"{path}: was not written by qgen: its header has no {KEY!r}")
    if len(set(texts.values())) != 1:
        raise BadCheckpoint(f"{where}: its shards are of different checkpoints")
    data = parse(next(iter(texts.values())), where)
    if data.get("format") != VERSION:
        raise BadCheckpoint(
            f"{where}: is of format {data.get('format')!r}, this qgen reads format {VERSION}; update qgen or save again"
        )
    stored = data.pop("sha256", None)
    if stored != _sum(data):
        raise BadCheckpoint(f"{where}: its header was changed or damaged after it was saved")
    header = _parsed(data, where)
    for name in sorted(header.tensors.keys() ^ files.tensors.keys()):
        told, found = (
            ("the header names", "no file holds it")
            if name in header.tensors
            else ("a file holds", "the header does not know it")
        )
        raise BadCheckpoint(f"{where}: {told} {name!r} and {found}")
    for entry in header.layers:
        _check_slots(entry, files, where)
    return header


def _parsed(data: dict, where: Path) -> Header:
    shapes = {"layers": list, "tensors": dict, "aliases": dict, "buffers": dict, "model": dict, "report": list}
    for key, kind in shapes.items():
        if not isinstance(data.get(key), kind):
            raise BadCheckpoint(
                f"{where}: wanted {key!r} as JSON {kind.__name__}, found {type(data.get(key)).__name__}"
            )
    layers = tuple(_entry(item, where) for item in data["layers"])
    paths = [entry.path for entry in layers]
    if len(set(paths)) != len(paths):
        raise BadCheckpoint(f"{where}: the layer {next(p for p in paths if paths.count(p) > 1)!r} is listed twice")
    for name, source in data["aliases"].items():
        if source not in data["tensors"] or name in data["tensors"]:
            raise BadCheckpoint(
                f"{where}: {name!r} is said to be tied to {source!r}, which does not fit the tensors that are there"
            )
    try:
        recipe = data.get("recipe") and Recipe.from_json(json.dumps(data["recipe"]))
    except (ValueError, TypeError, KeyError) as error:
        raise BadCheckpoint(f"{where}: its recipe cannot be read: {error}") from error
    try:
        attention = None if data.get("attention") is None else Choices.from_dict(data["attention"])
    except ValueError as error:
        raise BadCheckpoint(f"{where}: {error}") from None
    known = {str(dtype)[6:] for dtype in DTYPES.values()}
    if data["model"].get("dtype") not in known or not set(data["buffers"].values()) <= known:
        raise BadCheckpoint(f"{where}: its header names a dtype that torch lacks")
    return Header(
        layers, data["tensors"], data["aliases"], data["buffers"], data["model"], recipe, data["report"], attention
    )


def _entry(item: Any, where: Path | str) -> LayerEntry:
    """A layer's description as data to a LayerEntry, every field checked."""
    keys = {"path", "kind", "weight", "act", "rank", "hadamard", "slots", "dtype"}
    if not isinstance(item, dict) or set(item) - set(COUNTS) != keys:
        found = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise BadCheckpoint(f"{where}: a layer is described by {', '.join(sorted(keys))}, found {found}")
    path, dtype = item["path"], getattr(torch, str(item["dtype"]), None)
    right = (
        isinstance(path, str)
        and isinstance(item["slots"], (list, tuple))
        and all(isinstance(slot, str) for slot in item["slots"])
        and item["kind"] in _KINDS
        and dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(type(item[key]) is int and 0 <= item[key] <= _MOST for key in ("rank", "hadamard"))
        and all(type(item.get(key, 0)) is int and 0 <= item.get(key, 0) <= _MOST for key in COUNTS)
        and ("t_edges" in item["slots"]) == (item.get("bins", 0) > 1)
        and bool(item.get("bins", 0)) == any(slot in item["slots"] for slot in ("t_shift", "t_scale", "t_bias"))
        and ("t_mix" in item["slots"]) == bool(item.get("mix", 0))
        and ("t_edges" in item["slots"] or not item.get("mix", 0))
        and item.get("moved", 0) <= item.get("mix", 0)
        and bool(item.get("moved", 0)) == ("t_shift" in item["slots"] and bool(item.get("mix", 0)))
        and all((slot in item["slots"]) == bool(item.get("known", 0)) for slot in KNOWN)
        and (item["kind"] == "linear" or not item.get("known", 0))
        and not item["hadamard"] & (item["hadamard"] - 1)
        and set(item["slots"]) <= set(STORED)
        and isinstance(item["weight"], str)
        and isinstance(item["act"], str)
        and bool(item["rank"]) == ("down" in item["slots"]) == ("up" in item["slots"])
    )
    if not right:
        raise BadCheckpoint(
            f"{where}: the layer {str(path)[:80]!r} is described by what no layer can be: {str(item)[:200]}"
        )
    try:
        for name in filter(None, (item["weight"], item["act"])):
            formats.get(name)
    except ValueError as error:
        raise BadCheckpoint(f"{where}: {path!r}: {error}") from None
    fmt = formats.get(item["weight"])
    wanted = {slot for slot in fmt.shapes(1, fmt.unit) if slot in ("global_scale", "zero")}
    if wanted != {"global_scale", "zero"} & set(item["slots"]):
        told = ", ".join(sorted(wanted)) or "neither global_scale nor zero"
        raise BadCheckpoint(f"{where}: {path!r}: {fmt.name} has {told}, found {item['slots']}")
    return LayerEntry(
        path,
        item["kind"],
        Layout(
            item["weight"],
            item["act"],
            item["rank"],
            item["hadamard"],
            tuple(item["slots"]),
            **{key: item.get(key, 0) for key in COUNTS},
        ),
        dtype,
    )


def _check_slots(entry: LayerEntry, files: Files, where: Path) -> None:
    """That exactly the slots of the layout are there. Shapes are compared once the module is known."""
    prefix = entry.path + "." if entry.path else ""
    wanted = {"codes", "scales", *entry.layout.slots}
    found = {slot for slot in STORED if prefix + slot in files.tensors}
    if wanted != found:
        raise BadCheckpoint(
            f"{where}: {entry.path!r} wants the slots {', '.join(sorted(wanted))}, found {', '.join(sorted(found)) or 'none'}"
        )


def verify(name: str, tensor: Tensor, header: Header, where: Path | str) -> None:
    """BadCheckpoint unless the tensor is, bit for bit, the one that was saved."""
    if digest(tensor) != header.tensors.get(name):
        raise BadCheckpoint(f"{where}: {name!r} was changed or damaged after it was saved (sha256 differs)")


def _sum(data: dict) -> str:
    return hashlib.sha256(_dumps(data).encode()).hexdigest()


def _dumps(data: dict) -> str:
    return json.dumps(data, separators=(",", ":"))


def _plain(value: Any) -> Any:
    """JSON for what report rows may hold: tensors, NumPy numbers, tuples, sets; the rest as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("qgen-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "source"
