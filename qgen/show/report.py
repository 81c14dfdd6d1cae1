"""`qgen.report(pipe, "report.html")`: one self-contained page that says what became of every layer, how well, and how to do it again.

The page loads nothing from anywhere and runs no script. Names from model files are untrusted: all text is escaped in `qgen.show.page`.

    error = 10^(−SQNR / 20)      RMS of a layer's output error, relative to its float output; drawn once for calls the methods were fitted
                                 to and once for calls held out: where the second is much larger, the layer overfits.
"""

__all__ = ["environment", "report"]

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qgen.models import adapter_for
from qgen.recipe import Recipe
from qgen.show import page as html
from qgen.show import sections, timesteps
from qgen.show.allocation import allocation
from qgen.show.rows import gather


def report(
    x: Any,
    path: str | Path = "report.html",
    *,
    pictures: Sequence[tuple[str, Any, Any]] = (),
    scores: Any = None,
    commands: Sequence[str] = (),
    trajectory: Mapping[str, Sequence[float]] | None = None,
    title: str | None = None,
) -> Path:
    """Writes the page and returns its path; missing folders are made.

    Arguments:
        x: a quantized pipeline or module, just quantized or loaded.
        pictures: (caption, before, after), each a PIL picture, array or tensor (H, W, 3); embedded as PNG.
        scores: what `qgen.evaluate` returned, or several of them by name, {"rtn-int4": scores, …}.
        commands: what reproduces this result, as one would type it; default: the Python call with the recipe of this page.
        trajectory: relative RMS error of the latents at each step, by name, drawn as lines.
        title: default: the model's class and the recipe's name.

    NotQuantizable if nothing in x is quantized, ValueError for pictures of different sizes or shapes. Nothing is written then.
    """
    found = gather(x)
    recipes = _recipes(x)
    label = title or f"{type(x).__name__}, {' + '.join(dict.fromkeys(r.name for r in recipes.values())) or 'quantized'}"
    named = dict(scores) if isinstance(scores, Mapping) else {"": scores} if scores is not None else {}
    parts = [
        sections.tiles(found),
        sections.pictures(pictures),
        sections.scores(named),
        sections.layers(found),
        timesteps.ranges(x),
        timesteps.trajectory(trajectory or {}),
        sections.formats(found),
        allocation(x),
        sections.methods(found),
        sections.floats(found),
        sections.environment(environment()),
        sections.reproduce(recipes, commands or _calls(recipes)),
    ]
    page = html.page(label, parts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """Versions, processor, threads and GPU of this process, by name."""
    import importlib.metadata

    import torch

    found = {"qgen": version(), "Python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "safetensors", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} logical cores"
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        found["GPU"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        found["GPU"] = "none seen by torch"
    return found


def version() -> str:
    """The version of the installed distribution; "source" for a checkout that is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("qgen-diffusion")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _recipes(x: Any) -> dict[str, Recipe]:
    found = {name: getattr(module, "qgen_recipe", None) for name, module in adapter_for(x).denoisers(x).items()}
    return {name: recipe for name, recipe in found.items() if isinstance(recipe, Recipe)}


def _calls(recipes: dict[str, Recipe]) -> list[str]:
    if not recipes:
        return []
    return [
        "# Python; recipe.json holds the recipe shown here",
        "import qgen",
        'pipe = qgen.quantize(pipe, "recipe.json")  # pipe: the 16-bit pipeline or module; add prompts= or calibration= as before',
    ]
