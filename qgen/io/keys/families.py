"""Which model a single file is of, and diffusers' names for its tensors, without reading one.

diffusers knows the families and has a conversion for each; both run here on deferred tensors. Where diffusers' conversion assumes one
width, qgen has its own, in a file beside this one, registered in `conversions` under the class's name.
"""

__all__ = ["Plan", "conversions", "plan"]

import contextlib
import inspect
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import BadCheckpoint, QgenError
from qgen.io.keys.deferred import defer
from qgen.registry import Registry

log = logging.getLogger("qgen")
conversions: Registry[Callable[[dict[str, Tensor]], dict[str, Tensor]]] = Registry("layout of keys", "qgen.io.keys")

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
# diffusers' word for a file (its start is enough) and the class; the first that fits.
_CLASSES = {
    "flux-2": "Flux2Transformer2DModel",
    "flux-3": "Flux3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "auraflow": "AuraFlowTransformer2DModel",
    "ltx2": "LTX2VideoTransformer3DModel",
    "ltx-video": "LTXVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
    "hunyuan-video": "HunyuanVideoTransformer3DModel",
    "z-image-turbo-controlnet": "ZImageControlNetModel",
    "z-image": "ZImageTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "sana": "SanaTransformer2DModel",
    "wan-vace": "WanVACETransformer3DModel",
    "wan-animate": "WanAnimateTransformer3DModel",
    "wan": "WanTransformer3DModel",
    "hidream": "HiDreamImageTransformer2DModel",
    "cosmos": "CosmosTransformer3DModel",
    "qwen-image-2.1": "QwenImage21Transformer2DModel",
    "krea2": "Krea2Transformer2DModel",
    "minimax-h3": "MiniMaxH3Transformer3DModel",
    "stable_cascade": "StableCascadeUNet",
}
_UNET = "input_blocks.0.0.weight"


@dataclass(frozen=True)
class Plan:
    """tensors: deferred ones by diffusers' name. kind: the class, "" if unknown. config: diffusers' config, {} if unknown.

    unused: names in the file that the model does not have (text encoder, VAE, averages). renamed: whether any name changed.
    """

    tensors: dict[str, Tensor]
    kind: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    renamed: bool = True


def plan(
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    where: Path,
    config: dict[str, Any] | None = None,
) -> Plan:
    """Diffusers' names for the tensors of a file.

    config: of the diffusers model, where the caller has it. A file that has diffusers' names already, or whose family nobody knows, keeps
    its names, less a common prefix such as "model.diffusion_model.". BadCheckpoint if the family's conversion does not fit the file.
    """
    config = dict(config or {})
    stored = {name: defer(name, shapes[name], dtypes[name]) for name in shapes}
    kind = str(config.get("_class_name") or "")
    family = _family(stored, where)
    if not family:
        return _kept(stored, kind, config)
    kind = kind or next((name for start, name in _CLASSES.items() if family.startswith(start)), "")
    kind = "UNet2DConditionModel" if family == "unet" and not kind else kind
    bare = _bare(stored)
    try:
        if kind in conversions:
            made = conversions[kind](
                {name: t for name, t in bare.items() if not name.startswith(("vae.", "text_encoders."))}
            )
        else:
            made = _diffusers(kind, dict(stored), config, where)
        config = config or _config(kind, bare, stored)
    except QgenError as error:
        raise BadCheckpoint(f"{where}: {error}") from error
    except Exception as error:  # a function for whole, honest models meets any file
        what = f"{type(error).__name__}: {error}"[:200]
        raise BadCheckpoint(
            f"{where}: looks like {family} ({kind}) and cannot be renamed for diffusers: {what}"
        ) from error
    return Plan(made, kind, config, _unused(stored, made))


def _family(stored: dict[str, Tensor], where: Path) -> str:
    """diffusers' word for the file, "unet" for the first kind of Stable Diffusion, "" for none."""
    if any(name.endswith(_UNET) for name in stored):
        return "unet"
    try:
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    except ImportError:
        return "flux" if any(n.endswith("double_blocks.0.img_attn.norm.key_norm.scale") for n in stored) else ""
    try:
        found = infer_diffusers_model_type(stored)
    except Exception as error:  # it indexes shapes of an honest file
        log.debug("diffusers cannot tell what %s is: %s", where, error)
        return ""
    return "" if found == "v1" else found  # its answer for everything else


def _diffusers(kind: str, stored: dict[str, Tensor], config: dict[str, Any], where: Path) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry = SINGLE_FILE_LOADABLE_CLASSES.get(kind)
    if entry is None:
        raise BadCheckpoint(f"diffusers cannot read single files of {kind or 'this family'}")
    function = entry["checkpoint_mapping_fn"]
    wanted = inspect.signature(function).parameters
    if "config" in wanted and not config:
        raise BadCheckpoint(
            f"{kind} needs its config: pass the folder with the config.json of its diffusers version as `config`"
        )
    given = {"config": config} if "config" in wanted else {}
    with contextlib.redirect_stdout(io.StringIO()):  # some print
        return function(checkpoint=stored, **given)


def _config(kind: str, bare: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Any]:
    """The model's config, from shapes where they tell it, else from the local copy of the hub's repository, else {}."""
    import importlib

    module = getattr(conversions[kind], "__module__", "") if kind in conversions else ""
    derive = getattr(importlib.import_module(module), "config", None) if module else None
    if derive is not None:
        return derive({name: tuple(t.shape) for name, t in bare.items()}) or {}
    try:
        import diffusers
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        where = fetch_diffusers_config(stored)["pretrained_model_name_or_path"]
        folder = SINGLE_FILE_LOADABLE_CLASSES[kind].get("default_subfolder")
        found = getattr(diffusers, kind).load_config(where, subfolder=folder, local_files_only=True)
        return {"_class_name": kind, **found}
    except Exception as error:  # no copy, no network, no such class: the caller goes on without a config
        log.info("no config of %s at hand: %s", kind, str(error).splitlines()[0][:200])
        return {}


def _kept(stored: dict[str, Tensor], kind: str, config: dict[str, Any]) -> Plan:
    bare = _bare(stored)
    return Plan(bare, kind, config, renamed=bare.keys() != stored.keys())


def _bare(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without a prefix that most of them have; those without it belong to other models and are left out."""
    for prefix in _PREFIXES:
        mine = {name[len(prefix) :]: t for name, t in stored.items() if name.startswith(prefix)}
        if len(mine) * 2 > len(stored) or (prefix.startswith("model.") and mine):
            return mine
    return stored


def _unused(stored: dict[str, Tensor], made: dict[str, Tensor]) -> tuple[str, ...]:
    from qgen.io.keys.deferred import sources

    used = set().union(*(sources(t) for t in made.values()))
    return tuple(name for name in stored if name not in used)
