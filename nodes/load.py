"""Load Quantized Model: files of qgen, Nunchaku, nunchaku-lite, GGUF and ComfyUI's own formats, as a MODEL with packed layers.

ComfyUI tells the model from names and shapes of its tensors and builds it. For packed layers it is shown weights that take no memory; the
modules that ask for one of those, under whatever name ComfyUI gave it, come without weights and are exchanged afterwards. So files of
diffusers' UNets work as ComfyUI renames them. Nothing is dequantized that one of qgen's formats holds.
"""

__all__ = ["load", "model_from"]

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qgen.nodes import registry
from qgen.nodes.files import listed, read_path, stamp
from qgen.nodes.registry import Input, Node, Output

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(file: str, dtype: str = "auto") -> tuple[Any]:
    """The node."""
    return (model_from(read_path(file), DTYPES[dtype]),)


def model_from(path: Path, dtype: torch.dtype | None = None) -> Any:
    """A patcher with the quantized model of a file. BadCheckpoint for damaged files and those that nobody knows, ValueError for models that
    ComfyUI does not know."""
    import comfy.sd

    from qgen.io.keys import outward
    from qgen.io.parts import check
    from qgen.io.peers.base import Layer
    from qgen.nodes.clock import wind
    from qgen.nodes.models import REPORT, compute_dtype, exchange, patcher_around
    from qgen.nodes.ops import comfy_layer
    from qgen.nodes.progress import Bars

    parts, metadata = _parts(path)
    layers: dict[str, Layer] = {}
    tensors: dict[str, torch.Tensor] = {}
    shown: dict[int, str] = {}  # identity of a weight that takes no memory → path of its layer in the file
    with Bars()(total=max(1, parts.__length_hint__()), desc="read") as bar:
        for part in parts:
            bar.update()
            if isinstance(part, Layer):
                layers[part.path] = check(part)
                tensors[f"{part.path}.weight"] = weight = torch.zeros((), dtype=part.dtype).expand(part.shape)
                shown[id(weight)] = part.path
                if "bias" in part.slots or "t_bias" in part.slots:
                    tensors[f"{part.path}.bias"] = torch.zeros((), dtype=part.dtype).expand(part.shape[:1])
            else:
                tensors[part.name] = part.tensor
    if not layers:
        raise ValueError(f"file: {path.name} has no quantized layer; load it with Load Diffusion Model")
    kept_alive = list(tensors.values())  # or another tensor might get an identity that was known
    options = {"custom_operations": _operations(layers, shown)}
    if dtype is not None:
        options["dtype"] = dtype
    made = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options, metadata=metadata)
    del kept_alive
    if made is None:
        raise ValueError(f"file: ComfyUI knows no diffusion model with the layers of {path.name}")
    model = made.model
    module, computes = model.diffusion_model, dtype or compute_dtype(model)
    places = {getattr(layer, "qgen_path", ""): path for path, layer in module.named_modules()}
    for stored, layer in layers.items():
        if stored not in places:
            raise ValueError(
                f"file: {path.name} holds the layer {stored!r}, which ComfyUI's {type(module).__name__} does not have under this name; "
                f"of models whose layers ComfyUI fuses, diffusers' names are known here for {', '.join(outward)}"
            )
        at = places[stored]
        exchange(module, at, comfy_layer(layer.layout, layer.slots, layer.shape, computes, module.get_submodule(at)))
    wind(model)
    rows = [getattr(layer, "row", None) or _row(layer) for layer in layers.values()]
    out = patcher_around(model)
    out.set_attachments(REPORT, rows)
    return out


def _parts(path: Path) -> tuple[Any, dict]:
    """Parts under ComfyUI's names, and the file's texts."""
    from qgen.errors import BadCheckpoint
    from qgen.io.keys import original, outward
    from qgen.io.parts import Parts, importer_for, model_of, unknown_file
    from qgen.io.peers.source import open_source

    source = open_source(path)
    found = importer_for(source)
    if found is None:
        raise BadCheckpoint(unknown_file(source))
    about = model_of(source)
    parts = Parts(found[1].parts(source), len(source.shapes))
    names = list(source.shapes)
    kind = about.kind or (
        "FluxTransformer2DModel" if any(n.startswith("single_transformer_blocks.") for n in names) else ""
    )
    if kind in outward and any(
        name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in names
    ):
        parts = original(parts, kind)
    return parts, {key: text for key, text in source.metadata.items() if isinstance(text, str)}


def _operations(layers: dict[str, Any], shown: dict[int, str]) -> type:
    """ComfyUI's operations whose packed layers take no memory until they are exchanged.

    shown: paths in the file by the identity of a weight that takes no memory.
    """
    import comfy.ops

    class Bare:
        """A layer that waits for its exchange if the file holds it packed; else ComfyUI's own."""

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            path = shown.get(id(state_dict.get(prefix + "weight")))
            if path is None:
                return super()._load_from_state_dict(state_dict, prefix, *rest)
            self.qgen_path = path
            dtype = layers[path].dtype
            for name in ("weight", "bias"):
                state_dict.pop(prefix + name, None)
                if getattr(self, name, None) is not None:
                    empty = torch.empty(getattr(self, name).shape, dtype=dtype, device="meta")
                    setattr(self, name, nn.Parameter(empty, requires_grad=False))

    base = comfy.ops.manual_cast
    bare = {name: type(name, (Bare, getattr(base, name)), {}) for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")}
    return type("Operations", (base,), bare)


def _row(layer: Any) -> dict:
    k = torch.Size(layer.shape[1:]).numel()
    size = sum(t.nbytes for t in layer.slots.values())
    spec = f"{layer.layout.weight} x {layer.layout.act or 'float'}"
    facts = {"path": layer.path, "kind": layer.kind, "block": "", "role": "inside", "shape": [layer.shape[0], k]}
    return {**facts, "spec": spec, "nbytes": size, "bytes16": 2 * layer.shape[0] * k, "why": layer.note}


def _check(file: str) -> bool | str:
    return True if file in listed() else f"file: there is no {file!r} in models/qgen or models/diffusion_models"


def _changed(file: str) -> str:
    return stamp(file)


registry.register(
    Node(
        "QGenLoadModel",
        "Load Quantized Model (qgen)",
        "Loads a quantized diffusion model and keeps it packed: files of Save Quantized Model, Nunchaku, nunchaku-lite, GGUF, and "
        "ComfyUI's own quantized formats, from models/qgen and models/diffusion_models.",
        run=load,
        check=_check,
        changed=_changed,
        search=("qgen", "nunchaku", "gguf", "svdquant", "nvfp4", "int4", "unet loader"),
        inputs=(
            Input("file", "COMBO", "A file in models/qgen or models/diffusion_models.", choices=listed),
            Input(
                "dtype",
                "COMBO",
                "In which the float parts are kept and everything computes; auto is what ComfyUI takes here.",
                default="auto",
                choices=tuple(DTYPES),
                advanced=True,
            ),
        ),
        outputs=(Output("MODEL", "model", "The model, ready for LoRAs and samplers."),),
    )
)
