"""Save Quantized Model: for Load Quantized Model, for stock ComfyUI, or for diffusers' nunchaku_lite.

LoRAs behind the quantizer are written as they are in the model: as rank of the low-rank branch, or for ComfyUI's own formats rounded in.
"""

__all__ = ["FORMATS", "parts_of", "save"]

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qgen.nodes import registry
from qgen.nodes.files import FOLDERS, check_name, write_path
from qgen.nodes.registry import Input, Node, Output, Result

# What the node calls a format: exporter, its options, suffix of what it writes ("" = a folder).
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qgen": ("qgen", {}, ".safetensors"),
    "ComfyUI: as exact as possible": ("comfy", {}, ".safetensors"),
    "ComfyUI: nvfp4": ("comfy", {"format": "nvfp4,int8"}, ".safetensors"),
    "ComfyUI: mxfp8": ("comfy", {"format": "mxfp8,int8"}, ".safetensors"),
    "ComfyUI: fp8": ("comfy", {"format": "fp8,int8"}, ".safetensors"),
    "ComfyUI: int8": ("comfy", {"format": "int8"}, ".safetensors"),
    "ComfyUI: convrot_w4a4": ("comfy", {"format": "convrot_w4a4,int8"}, ".safetensors"),
    "ComfyUI: svdquant_w4a4 (newer ComfyUI)": ("comfy", {"format": "svdquant_w4a4,int8"}, ".safetensors"),
    "nunchaku-lite (diffusers)": ("nunchaku-lite", {}, ""),
}


def parts_of(patcher: Any, timed: bool = False) -> tuple[Any, list[dict]]:
    """The parts of a patcher's diffusion model with its patches, and the report. timed: whether tables over timesteps can be held.

    ValueError if nothing is packed, or if there are such tables and the format cannot hold them.
    """
    from qgen.io.parts import Parts, of_module
    from qgen.io.peers.base import Plain
    from qgen.nn.packed import Packed
    from qgen.nodes.models import REPORT
    from qgen.nodes.ops import adapt

    module = patcher.model.diffusion_model
    for path in patcher.object_patches:
        if isinstance(patcher.object_patches[path], Packed):
            raise ValueError(
                "model: its packed layers are object patches of another node; save what Quantize Model gives"
            )
    layers = [layer for layer in module.modules() if isinstance(layer, Packed)]
    if not layers:
        raise ValueError("model: nothing in it was quantized by qgen; put Quantize Model before this node")
    if not timed and any(layer.timed for layer in layers):
        raise ValueError("format: the model has tables over timesteps, which only the format qgen holds; choose qgen")
    if not timed and any(layer.known_x is not None for layer in layers):
        raise ValueError("format: the model keeps outputs of known rows, which only the format qgen holds; choose qgen")
    import comfy.model_management as management

    unload = getattr(management, "unload_model_and_clones", None) or management.unload_model_clones
    unload(patcher)
    adapt(patcher)  # LoRAs of this very patcher, and no others
    rows = patcher.get_attachment(REPORT) or []
    module.__dict__["qgen_report"] = rows
    made = of_module(module, timed)

    def patched() -> Iterator[Any]:
        for part in made:
            key = f"diffusion_model.{part.name}" if isinstance(part, Plain) else ""
            if key in patcher.patches:
                part = Plain(
                    part.name, patcher.patch_weight_to_device(key, patcher.offload_device, return_weight=True).detach()
                )
            if isinstance(part, Plain) and part.name.endswith(("query_norm.weight", "key_norm.weight")):
                part = Plain(
                    part.name.removesuffix("weight") + "scale", part.tensor
                )  # as Flux's files have it, and every ComfyUI reads
            yield part

    return Parts(patched(), made.__length_hint__()), rows


def save(model: Any, name: str, format: str = "qgen", folder: str = "qgen", overwrite: bool = False) -> Result:
    """The node. Writes the file whole or not at all, and shows what could not be kept as it is."""
    from qgen.io.peers.base import exporters

    exporter, options, suffix = FORMATS[format]
    target = write_path(folder, name, suffix)
    if target.exists() and not overwrite:
        raise ValueError(
            f"name: {target.name} is there already in models/{folder}; choose another name, or turn on overwrite"
        )
    parts, rows = parts_of(model, exporter == "qgen")
    about = _about(model)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as work:
        made = Path(work) / "made"
        if exporter == "nunchaku-lite":
            from qgen.nodes.renaming import to_diffusers

            parts, about = to_diffusers(parts)
        elif exporter == "comfy":
            parts = _in_eight_bits(parts, rows)
        lines = exporters[exporter].write(parts, made, about=about, **options)
        if exporter == "comfy":
            _recognizable(made, model.model.diffusion_model)
        if exporter == "qgen":
            made = next(made.glob("*.safetensors"))
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(made, target)
    size = sum(f.stat().st_size for f in ([target] if target.is_file() else target.iterdir()))
    told = [f"{target.name}: {size / 1e6:.1f} MB", *lines[:20]]
    if len(lines) > 20:
        told.append(f"… and {len(lines) - 20} more")
    return Result(
        (target.name if suffix else f"{target.name}/diffusion_pytorch_model.safetensors",), {"text": ["\n".join(told)]}
    )


def _in_eight_bits(parts: Any, rows: list[dict]) -> Any:
    """Parts whose layers outside of what repeats, and those that read the text, have 8 bits in ComfyUI's int8.

    They see few rows, where 4-bit inputs cost most; and ComfyUI tells models by the width of these layers, which 4-bit bytes would halve.
    """
    from qgen.io.parts import Parts
    from qgen.io.peers.base import Layer
    from qgen.io.peers.comfy_formats import FORMATS as NATIVE
    from qgen.nodes.quantizing import named_role

    native, roles = NATIVE["int8"], {row["path"]: row.get("role") for row in rows}

    def changed() -> Iterator[Any]:
        for part in parts:
            if (
                isinstance(part, Layer)
                and part.kind == "linear"
                and (roles.get(part.path), named_role(part.path)) != ("inside", "")
            ):
                part = part if native.refusal(part) == "" or native.fits(*part.shape) else native.refit(part)
            yield part

    return Parts(changed(), parts.__length_hint__())


def _recognizable(path: Path, module: Any) -> None:
    """ValueError if stock ComfyUI would take the file for another model: it tells them by shapes, and packed ones are narrower."""
    import torch
    from comfy.model_detection import detect_unet_config

    from qgen.io.peers.source import open_source
    from qgen.nodes.ops import ComfyLayer

    shapes = dict(open_source(path).shapes)
    true = dict(shapes)
    for name, layer in module.named_modules():
        if isinstance(layer, ComfyLayer):
            true[f"{name}.weight"] = tuple(layer._weight_shape())
    wanted, found = (
        detect_unet_config({n: torch.zeros((), dtype=torch.bfloat16).expand(s) for n, s in kind.items()}, "")
        for kind in (true, shapes)
    )
    if wanted != found:
        wrong = [key for key in wanted or {} if (found or {}).get(key) != wanted[key]]
        raise ValueError(
            f"format: stock ComfyUI would take the file for another model ({', '.join(wrong)}); choose qgen or int8"
        )


def _about(patcher: Any) -> Any:
    from qgen.io.peers.base import Model

    recipe = getattr(patcher.model.diffusion_model, "qgen_recipe", None)
    texts = {"recipe": recipe.to_json(None)} if recipe is not None else {}
    return Model(type(patcher.model.diffusion_model).__name__, {}, texts)


def _check(name: str) -> bool | str:
    return check_name(name)


registry.register(
    Node(
        "QGenSaveModel",
        "Save Quantized Model (qgen)",
        "Writes a quantized model into models/qgen or models/diffusion_models. qgen keeps everything for Load Quantized Model; the ComfyUI "
        "formats open in the stock Load Diffusion Model node without any pack, nunchaku-lite opens in diffusers.",
        run=save,
        check=_check,
        ends=True,
        search=("qgen", "export", "save", "nvfp4", "nunchaku", "svdquant"),
        inputs=(
            Input(
                "model",
                "MODEL",
                "A model from Quantize Model or Load Quantized Model, with LoRAs behind it if you like.",
            ),
            Input("name", "STRING", "Name of the file, without folders; its ending is added.", default="model-4bit"),
            Input("format", "COMBO", "For whom the file is.", default="qgen", choices=tuple(FORMATS)),
            Input("folder", "COMBO", "Folder of ComfyUI's models that it goes to.", default="qgen", choices=FOLDERS),
            Input("overwrite", "BOOLEAN", "Whether a file of that name is replaced.", default=False),
        ),
        outputs=(Output("STRING", "file", "Name of the file, as Load Quantized Model lists it."),),
    )
)
