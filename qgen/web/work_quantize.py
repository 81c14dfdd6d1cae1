"""A quantize job, in its own process: load, quantize, measure each layer at each step, save, report.

The folder of the job then holds model/ (as `qgen.save` writes it), report.html, recipe.json, and model.zip where that is small enough to
be carried away by a browser. A single file is converted tensor by tensor, by a recipe that needs no calibration.
"""

__all__ = ["quantize", "with_rank"]

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgen.named import load
from qgen.recipe import Recipe, Spec

_ZIP_AT_MOST = 512 << 20  # bytes of a model that is also offered as one file
_HEAT_PROMPTS, _HEAT_STEPS = 4, 10


def quantize(asked: dict[str, Any], folder: Path, device: str, report: Any) -> dict[str, Any]:
    """What the job's result is: rows and totals as `qgen.summary` has them, heat as `qgen.web.heat` makes it, names of files."""
    recipe = recipe_of(asked)
    if _is_file(asked["model"]):
        return _convert(asked, recipe, folder, report)
    report.say(f"loading {asked['model']}")
    report.step(f"loading {asked['model']}")
    pipe = load(asked["model"], device=device)
    before = _copies(pipe) if asked.get("heat") else {}
    report.say(f"quantizing {type(pipe).__name__} with {recipe.name}")
    _run(pipe, recipe, asked)
    report.say("saving")
    report.step("saving the quantized model")
    return {**_written(pipe, recipe, asked, folder), "heat": _heat(pipe, before, asked, report)}


def recipe_of(asked: dict[str, Any]) -> Recipe:
    """The recipe by name, with the rank and the skipped layers that were asked for; ValueError for what does not fit together."""
    from qgen import recipes

    recipe = recipes.get(asked["recipe"])
    if _is_file(asked["model"]) and asked.get("budget"):
        raise ValueError(
            "a budget weighs layers while a pipeline draws, and a single file draws nothing: leave the budget empty"
        )
    if asked.get("rank"):
        recipe = with_rank(recipe, asked["rank"])
    return recipe.skip(*asked.get("skip") or ())


def with_rank(recipe: Recipe, rank: int) -> Recipe:
    """The same recipe with another rank of its low-rank branches; ValueError if it has none."""

    def changed(spec: Spec | None) -> Spec | None:
        if spec is None:
            return None
        return replace(spec, methods=tuple(replace(m, rank=rank) if m.name == "lowrank" else m for m in spec.methods))

    specs = [recipe.default, *(rule.spec for rule in recipe.rules)]
    if not any(method.name == "lowrank" for spec in specs if spec for method in spec.methods):
        raise ValueError(f"{recipe.name} has no low-rank branch whose rank could be set: leave the rank at 0")
    return replace(
        recipe,
        default=changed(recipe.default),
        rules=tuple(replace(rule, spec=changed(rule.spec)) for rule in recipe.rules),
    )


def _run(pipe: Any, recipe: Recipe, asked: dict[str, Any]) -> None:
    from qgen import engine
    from qgen.calibration.recorder import Recorder

    options: dict[str, Any] = {"seed": asked.get("seed", 0), "memory": asked.get("memory") or None}
    if asked.get("budget"):
        options["budget"] = asked["budget"]
    if hasattr(pipe, "components"):
        if any(spec.methods for spec in (recipe.default, *(rule.spec for rule in recipe.rules)) if spec):
            options["calibration"] = _recorder(Recorder, asked)
        options["prompts"] = asked.get("prompts") or None
        options["call_kwargs"] = {"num_inference_steps": asked["steps"]} if asked.get("steps") else None
    engine.quantize(pipe, recipe, **options)


def _recorder(kind: Any, asked: dict[str, Any]) -> Any:
    samples = asked["samples"]
    return kind(samples, asked["keep"], batch=min(8, max(1, samples // 2)) if asked["model"] == "demo" else 0)


def _copies(pipe: Any) -> dict[str, Any]:
    """The 16-bit denoisers as they are before they are quantized; none for a bare module, which nobody can drive."""
    from qgen.models import adapter_for

    if not hasattr(pipe, "components"):
        return {}
    return {name: copy.deepcopy(module) for name, module in adapter_for(pipe).denoisers(pipe).items()}


def _heat(pipe: Any, before: dict[str, Any], asked: dict[str, Any], report: Any) -> dict[str, Any] | None:
    """Errors of layers by timestep of the first denoiser, on calls that the 16-bit model makes."""
    if not before:
        return None
    from qgen.calibration.recorder import Recorder
    from qgen.web.heat import errors_by_step

    report.say("measuring each layer at each step")
    after = {name: getattr(pipe, name) for name in before}
    try:
        for name, module in before.items():
            setattr(pipe, name, module)
        options = {"num_inference_steps": asked["steps"]} if asked.get("steps") else {}
        given = (asked.get("prompts") or [])[:_HEAT_PROMPTS] or None
        sets = Recorder(_HEAT_PROMPTS, _HEAT_STEPS, batch=_HEAT_PROMPTS, texts=0).calls(
            pipe, before, given, options, seed=1
        )
    finally:
        for name, module in after.items():
            setattr(pipe, name, module)
    name = next(iter(sets))
    return errors_by_step(before[name], after[name], sets[name].calls, report.progress)


def _written(pipe: Any, recipe: Recipe, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    from qgen.io.checkpoint import save
    from qgen.show.report import report as page
    from qgen.show.rows import gather

    save(pipe, folder / "model")
    (folder / "recipe.json").write_text(recipe.to_json() + "\n", encoding="utf-8")
    page(pipe, folder / "report.html", commands=[command_of(asked)])
    found = gather(pipe)
    files = ["report.html", "recipe.json", *_zipped(folder)]
    return {"rows": list(found), "totals": found.totals, "files": files, "command": command_of(asked)}


def _zipped(folder: Path) -> list[str]:
    if sum(path.stat().st_size for path in (folder / "model").rglob("*") if path.is_file()) > _ZIP_AT_MOST:
        return []
    shutil.make_archive(str(folder / "model"), "zip", folder / "model")
    return ["model.zip"]


def _convert(asked: dict[str, Any], recipe: Recipe, folder: Path, report: Any) -> dict[str, Any]:
    from qgen.io.convert import convert
    from qgen.show.headers import read

    report.say(f"converting {Path(asked['model']).name} tensor by tensor with {recipe.name}")
    lines = convert(
        asked["model"],
        recipe,
        folder / "model",
        progress=lambda done, total: report.progress("reading and rounding", done, total),
    )
    for line in lines[:20]:
        report.say(line)
    (folder / "recipe.json").write_text(recipe.to_json() + "\n", encoding="utf-8")
    found = read(folder / "model")
    return {
        "rows": list(found), "totals": found.totals, "heat": None, "files": ["recipe.json", *_zipped(folder)], "command": command_of(asked),
    }  # fmt: skip


def command_of(asked: dict[str, Any]) -> str:
    """The same from the command line."""
    import shlex

    model = asked["model"]
    if _is_file(model):
        changed = asked.get("rank") or asked.get("skip")
        return shlex.join(
            ["qgen", "convert", model, "--recipe", "recipe.json" if changed else asked["recipe"], "--out", "OUT"]
        )
    words = [
        "qgen",
        "quantize",
        model,
        "--recipe",
        "recipe.json" if asked.get("rank") else asked["recipe"],
        "--out",
        "OUT",
    ]
    names = {
        "samples": "--samples",
        "keep": "--keep",
        "steps": "--steps",
        "memory": "--memory",
        "budget": "--budget",
        "seed": "--seed",
    }
    for key, flag in names.items():
        if asked.get(key):
            words += [flag, str(asked[key])]
    for pattern in asked.get("skip") or ():
        words += ["--skip", pattern]
    return shlex.join(words)


def _is_file(model: str) -> bool:
    """Whether a single file is to be converted, tensor by tensor."""
    return model != "demo" and Path(model).is_file()
