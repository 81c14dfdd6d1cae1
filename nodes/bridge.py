"""The bridge to diffusers, for models that ComfyUI lacks: load a pipeline, quantize it, draw with it, all inside the graph.

Pipelines are folders in ComfyUI's `models/diffusers`, read from this disk only: nothing is downloaded, no code of a folder is run, and only
safetensors are opened. `built-in emoji demo` is the 14 MB pipeline that qgen ships, so that the nodes can be tried at once.
"""

__all__ = ["draw", "folders", "load", "quantize"]

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qgen.nodes import registry
from qgen.nodes.images import from_pil
from qgen.nodes.inputs import recipe as recipe_input
from qgen.nodes.inputs import seed as seed_input
from qgen.nodes.progress import Bars, stop_if_asked
from qgen.nodes.registry import Input, Node, Output, Result

DEMO = "built-in emoji demo"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PREVIEW = 32  # latents are shrunk to this many columns before a preview decodes them
KIND = "QGEN_PIPELINE"


def folders() -> list[str]:
    """The demo, where its weights are, and each folder of `models/diffusers` that holds a pipeline, by its path below that folder."""
    return [*([DEMO] if _has_demo() else []), *sorted(_places())]


def _has_demo() -> bool:
    """A node pack out of ComfyUI's registry comes without the demo's weights."""
    from qgen.assets import assets_dir
    from qgen.errors import QgenError

    try:
        return assets_dir().is_dir()
    except QgenError:
        return False


def _places() -> dict[str, Path]:
    """Pipelines by name. Names come from listing, never from the user, so none of them leads elsewhere."""
    import folder_paths

    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for index in sorted(root.glob("*/model_index.json")) + sorted(root.glob("*/*/model_index.json")):
            if index.resolve().is_relative_to(root.resolve()):
                found.setdefault(index.parent.relative_to(root).as_posix(), index.parent)
    return found


def load(pipeline: str, dtype: str = "bfloat16") -> tuple[Any]:
    """(pipeline,) on the CPU. ValueError for a name that is not listed, a folder without safetensors or one that wants its own code run."""
    if pipeline == DEMO:
        from qgen.demo import demo_pipeline

        return (demo_pipeline(DTYPES[dtype]),)
    places = _places()
    if pipeline not in places:
        raise ValueError(f"pipeline: no pipeline {pipeline!r} in models/diffusers; press R to list it anew")
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(
            places[pipeline], dtype=DTYPES[dtype], local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"pipeline: {pipeline!r} cannot be opened: {str(error).splitlines()[0]}") from error
    return (pipe,)


def fresh(pipeline: str) -> str:
    """What stands for a pipeline's files: their sizes and times, so that a changed folder is loaded anew."""
    place = _places().get(pipeline)
    if place is None:
        return pipeline
    files = sorted(p for p in place.rglob("*") if p.is_file())
    return repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files])


def copied(pipe: Any) -> Any:
    """A pipeline whose denoisers are copies, and which shares all other parts: what is done to one is not done to the other."""
    from qgen.models import adapter_for

    denoisers = adapter_for(pipe).denoisers(pipe)
    parts = dict(pipe.components) | {name: copy.deepcopy(module) for name, module in denoisers.items()}
    known = inspect.signature(type(pipe).__init__).parameters
    told = {
        name: value for name, value in pipe.config.items() if name in known and name not in parts and name[0] != "_"
    }
    return type(pipe)(**parts, **told)


def quantize(
    pipe: Any, recipe: str = "auto", prompts: str = "", steps: int = 0, samples: int = 32, seed: int = 0
) -> tuple[Any]:
    """(a quantized copy,); the pipeline that came in is left as it is, also when somebody presses stop."""
    import qgen
    from qgen.calibration.recorder import Recorder
    from qgen.recipes import get

    get(recipe)  # an unknown name is an error before the copy is made
    mine = [line.strip() for line in prompts.splitlines() if line.strip()] or None
    made = copied(pipe)
    beats = [module.register_forward_pre_hook(lambda *_: stop_if_asked()) for module in _denoisers(made).values()]
    try:
        options = {"num_inference_steps": steps} if steps else None
        recorder = Recorder(samples=samples)
        made = qgen.quantize(
            made, recipe, prompts=mine, call_kwargs=options, calibration=recorder, seed=seed, progress=Bars()
        )
    finally:
        for beat in beats:
            beat.remove()
    return (made,)


def _denoisers(pipe: Any) -> dict[str, Any]:
    from qgen.models import adapter_for

    return adapter_for(pipe).denoisers(pipe)


def draw(
    pipe: Any,
    prompt: str,
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 20,
    guidance: float = 3.0,
    width: int = 0,
    height: int = 0,
    count: int = 1,
    preview: bool = True,
) -> Result:
    """Pictures (B, H, W, 3) of `count` draws; each has noise of its own, so that picture i of a batch is picture 1 of seed + i."""
    import comfy.model_management
    import comfy.utils

    known = inspect.signature(type(pipe).__call__).parameters
    device = comfy.model_management.get_torch_device()
    options: dict[str, Any] = {"prompt": [prompt] * count, "num_inference_steps": steps}
    options |= {"guidance_scale": guidance, "output_type": "pil"}
    options |= {"negative_prompt": [negative_prompt] * count} if negative_prompt else {}
    options |= {name: size for name, size in (("width", width), ("height", height)) if size}
    options["generator"] = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
    meter = comfy.utils.ProgressBar(steps)
    hooks: list[Any] = []
    if "callback_on_step_end" in known:
        options["callback_on_step_end"] = _on_step(meter, preview, width or height)
    else:
        hooks = [module.register_forward_pre_hook(lambda *_: _beat(meter)) for module in _denoisers(pipe).values()]
    taken = _taken(pipe, known, options)
    before = pipe.device
    try:
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            pictures = pipe(**taken).images
    finally:
        for hook in hooks:
            hook.remove()
        pipe.to(before)
    return Result((from_pil(*pictures),))


def _taken(pipe: Any, known: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that this pipeline's call knows. ValueError names a field that it lacks although the user set it."""
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        known = {
            name: p
            for kind in type(pipe).__mro__
            if "__call__" in vars(kind)
            for name, p in inspect.signature(kind.__call__).parameters.items()
        }
    for name in ("prompt", "negative_prompt", "width", "height"):
        if name in options and name not in known:
            raise ValueError(f"{name}: {type(pipe).__name__} takes no {name}; leave the field as it was")
    return {name: value for name, value in options.items() if name in known}


def _beat(meter: Any) -> None:
    stop_if_asked()
    meter.update(1)


def _on_step(meter: Any, preview: bool, size: int) -> Callable:
    """diffusers' callback after a step: asks for a stop, moves the bar, shows what the latents hold so far."""

    def on_step(pipe: Any, step: int, timestep: Any, kwargs: dict) -> dict:
        stop_if_asked()
        meter.update_absolute(step + 1, None, _preview(pipe, kwargs.get("latents"), size) if preview else None)
        return kwargs

    return on_step


def _preview(pipe: Any, latents: Any, size: int) -> tuple | None:
    """("JPEG", picture, longest side) of the first latent, shrunk and sent through the pipeline's own decoder; None for other kinds."""
    vae = getattr(pipe, "vae", None)
    if latents is None or vae is None:
        return None
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):  # Flux and its like keep latents as a row of patches
        side = size or round(latents.shape[1] ** 0.5) * 2 * pipe.vae_scale_factor
        if (side // (2 * pipe.vae_scale_factor)) ** 2 != latents.shape[1]:
            return None
        latents = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
    if latents.ndim != 4:
        return None
    x = latents[:1].to(vae.dtype)
    if x.shape[-1] > PREVIEW:
        x = torch.nn.functional.interpolate(x, scale_factor=PREVIEW / x.shape[-1], mode="area")
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    with torch.inference_mode():
        y = vae.decode(x / (getattr(vae.config, "scaling_factor", None) or 1.0) + shift, return_dict=False)[0]
    from PIL import Image

    pixels = ((y[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
    return ("JPEG", Image.fromarray(pixels), 512)


def listed(pipeline: str) -> bool | str:
    return pipeline in folders() or f"pipeline: no pipeline {pipeline!r} in models/diffusers"


_NEEDS = ("diffusers", "transformers")
_PIPE = Output(KIND, "pipeline", "A diffusers pipeline, for the nodes of the bridge.")

registry.register(
    Node(
        "QGenLoadPipeline",
        "Load Diffusers Pipeline (qgen)",
        "Opens a diffusers pipeline out of models/diffusers, for models that ComfyUI has no code for; or qgen's small built-in demo. "
        "Checkpoints that qgen has quantized open too.",
        run=load,
        inputs=(
            Input(
                "pipeline",
                "COMBO",
                "A folder of models/diffusers with a model_index.json, or the built-in demo.",
                choices=folders,
            ),
            Input("dtype", "COMBO", "In which precision weights are read.", default="bfloat16", choices=tuple(DTYPES)),
        ),
        outputs=(_PIPE,),
        search=("diffusers", "pipeline", "huggingface", "loader"),
        needs=_NEEDS,
        category="qgen/diffusers",
        check=listed,
        changed=fresh,
    )
)
registry.register(
    Node(
        "QGenQuantizePipeline",
        "Quantize Diffusers Pipeline (qgen)",
        "Draws a few pictures to see what flows through each layer, then makes a 4-bit copy of the denoiser. Shows how long it takes; "
        "stopping it leaves the pipeline that came in as it was.",
        run=quantize,
        inputs=(
            Input("pipe", KIND, "The pipeline to quantize; it is not changed."),
            recipe_input("What becomes of the layers; auto picks for this computer."),
            Input(
                "prompts",
                "STRING",
                "Prompts to calibrate with, one a line; empty = the pipeline's own or a built-in set.",
                default="",
                multiline=True,
            ),
            Input(
                "steps",
                "INT",
                "Denoising steps while calibrating; 0 = the pipeline's default.",
                default=0,
                low=0,
                high=200,
            ),
            Input("samples", "INT", "At most so many prompts.", default=32, low=1, high=1024),
            seed_input("Chooses the noise of calibration and the methods' random numbers.", bits=31),
        ),
        outputs=(_PIPE,),
        search=("quantize", "4-bit", "svdquant", "nvfp4", "int4", "compress"),
        needs=_NEEDS,
        category="qgen/diffusers",
    )
)
registry.register(
    Node(
        "QGenSamplePipeline",
        "Sample Diffusers Pipeline (qgen)",
        "Draws with a diffusers pipeline, with progress and a preview after every step.",
        run=draw,
        inputs=(
            Input("pipe", KIND, "A pipeline, 16-bit or quantized."),
            Input("prompt", "STRING", "What to draw.", default="noto owl", multiline=True),
            Input(
                "negative_prompt",
                "STRING",
                "What to avoid; empty = the pipeline's default.",
                default="",
                multiline=True,
            ),
            seed_input("Chooses the noise; further pictures of a batch take the next numbers.", bits=63, rolls=True),
            Input("steps", "INT", "Denoising steps.", default=20, low=1, high=1000),
            Input("guidance", "FLOAT", "Guidance scale.", default=3.0, low=0.0, high=100.0, step=0.1),
            Input("width", "INT", "Width in pixels; 0 = the pipeline's default.", default=0, low=0, high=8192, step=8),
            Input(
                "height", "INT", "Height in pixels; 0 = the pipeline's default.", default=0, low=0, high=8192, step=8
            ),
            Input("count", "INT", "How many pictures.", default=1, low=1, high=64),
            Input(
                "preview",
                "BOOLEAN",
                "Show the picture as it grows; costs one small decoding a step.",
                default=True,
                advanced=True,
            ),
        ),
        outputs=(Output("IMAGE", "images", "The pictures."),),
        search=("diffusers", "generate", "sampler", "pipeline"),
        needs=_NEEDS,
        category="qgen/diffusers",
    )
)
