"""What `qgen eval` can score, one function per kind; each returns a `Result`, and `write` puts it on stdout and into --out."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from qgen.cli.common import TYPED, calibrates, load, note, own_prompts, read_recipe, typed

SHOWN = 6  # pictures on the page


@dataclass(frozen=True)
class Result:
    """Scores, the pictures to show as (prompt, reference's, model's), facts for the page, and the model if it is quantized."""

    scores: Any
    pictures: Sequence[tuple[str, Any, Any]] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    model: Any = None


@dataclass(frozen=True)
class Job:
    """Who draws, and how."""

    model: str
    reference: str | None
    recipe: str | None
    dtype: str
    device: str
    draw: Mapping[str, Any]
    out: Path | None
    ray: str | None
    workers: int


def pipelines(
    job: Job, prompts: str | None, n: int | None, metrics: list[str], extractor: Any, real: Any
) -> Result | None:
    """Draws with two pipelines from the same noise and scores; None in a helper process, whose part is drawing."""
    from qgen.eval.evaluate import METRICS, evaluate
    from qgen.eval.images import as_images
    from qgen.eval.metrics import Shots, check_early
    from qgen.eval.prompt_sets import load_prompts
    from qgen.eval.resume import my_share

    if job.reference is None and job.recipe is None:
        either = "--reference MODEL is wanted (the 16-bit model, or a folder of its pictures)"
        raise ValueError(f"{either}, or --recipe NAME to quantize MODEL here")
    if job.ray is not None and job.recipe is not None:
        raise ValueError("--ray loads saved models: quantize first with `qgen quantize`, then name the saved folder")
    names = metrics or list(METRICS)
    chosen = load_prompts(prompts, n) if prompts else None
    check_early(names, Shots((), (), (), real, extractor))
    base = job.reference or job.model
    before, theirs = None, None
    if is_picture_folder(base):
        before = as_images(base, "the reference's pictures")
    else:
        theirs = load(base, job.dtype, _device(job.device))
    pipe = theirs if job.reference is None else load(job.model, job.dtype, _device(job.device))
    if chosen is None:
        if own_prompts(pipe, "held_out") is None:
            raise ValueError(
                "--prompts SET is wanted, such as builtin or a file; a few dozen give an interval that says something"
            )
        chosen = load_prompts("demo", n)
    asked = list(chosen.prompts)
    if before is None:
        note(f"drawing {len(asked)} pictures with the reference")
        before = _drawn(job, "reference", base, theirs, asked)
    del theirs
    if job.recipe is not None:
        from qgen.engine import quantize

        note(f"quantizing by {job.recipe}")
        quantize(pipe, read_recipe(job.recipe, job.device), progress=False)
    note(f"drawing {len(asked)} pictures with {job.model}")
    after = _drawn(job, "model", job.model, pipe, asked)
    if not my_share().main:
        return None
    seed, size = job.draw["seed"], job.draw["batch_size"]
    scores = evaluate(after, before, asked, metrics=names, extractor=extractor, real=real, seed=seed, batch_size=size)
    about = {
        "prompts": f"{chosen.name}, {len(asked)} of them, {chosen.digest}",
        "licence of the prompts": chosen.licence,
    }
    about |= {"model": job.model, "reference": base, "recipe": job.recipe or "as saved"}
    about |= {name: str(value) for name, value in job.draw.items() if value is not None}
    shown = list(zip(asked, before, after, strict=True))[:SHOWN]
    return Result(scores, shown, about, pipe if _quantized(pipe) else None)


def folders(
    model: str,
    reference: str | None,
    prompts: str | None,
    n: int | None,
    metrics: list[str],
    extractor: Any,
    real: Any,
    batch_size: int,
    seed: int,
) -> Result:
    """Scores pictures of a folder against another's, paired in the order of their names."""
    from qgen.eval.evaluate import METRICS, evaluate
    from qgen.eval.images import as_images, picture_paths
    from qgen.eval.prompt_sets import load_prompts

    pictures = as_images(model, f"pictures of {model}")[:n]
    theirs = None if reference is None else as_images(reference, f"pictures of {reference}")[:n]
    words = None if prompts is None else list(load_prompts(prompts, len(pictures)).prompts)
    usual = [name for name in METRICS if words is not None or name != "clip"]
    options = {
        "metrics": metrics or usual,
        "extractor": extractor,
        "real": real,
        "batch_size": batch_size,
        "seed": seed,
    }
    scores = evaluate(pictures, theirs, words, **options)
    captions = words or [path.name for path in picture_paths(model)]
    shown = [] if theirs is None else list(zip(captions, theirs, pictures, strict=False))[:SHOWN]
    return Result(scores, shown, {"pictures": model, "reference": reference or "none"})


def clips(model: str, reference: str | None, metrics: list[str], seed: int) -> Result:
    """Scores clips of a folder against another's."""
    from qgen.eval.video import METRICS, evaluate_video

    found = evaluate_video(model, reference, metrics=metrics or METRICS, seed=seed)
    return Result(found, about={"clips": model, "reference": reference or "none"})


def scenes(model: str, reference: str | None, metrics: list[str], seed: int) -> Result:
    """Scores poses, depth and points in .npz files against others of the same names."""
    from qgen.eval.geometry import evaluate_geometry, load_scene

    if reference is None or metrics:
        raise ValueError("--geometry needs --reference FILE, and scores what both hold: leave --metrics out")
    mine, theirs = _npz(Path(model)), _npz(Path(reference))
    if [p.name for p in mine] != [p.name for p in theirs] and len(mine) > 1:
        raise ValueError(f"scenes of equal names wanted, found {len(mine)} in {model} and {len(theirs)} in {reference}")
    found = evaluate_geometry([load_scene(p) for p in mine], [load_scene(p) for p in theirs], seed=seed)
    return Result(found, about={"scenes": model, "reference": reference})


def words(
    model: str, reference: str | None, text: Path, n: int | None, recipe: str | None, dtype: str, device: str, seed: int
) -> Result:
    """Scores a language model on a text file, a document per paragraph. A recipe that calibrates gets every other one to itself."""
    from transformers import AutoTokenizer

    from qgen.eval.text import evaluate_text

    try:
        documents = [part.strip() for part in text.read_text(encoding="utf-8-sig").split("\n\n") if part.strip()][:n]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {text} cannot be read as UTF-8 text: {error}") from None
    if not documents:
        raise ValueError(f"--text {text} holds no text")
    chosen = read_recipe(recipe, device) if recipe else None
    fit = documents[::2] if chosen is not None and calibrates(chosen) else []
    if fit and len(documents) < 2:
        raise ValueError(
            f"recipe {recipe} calibrates: --text {text} wants two paragraphs or more, one is for the score"
        )
    documents = documents[1::2] if fit else documents
    base = reference or (model if recipe else None)
    theirs = load(base, dtype, device) if base else None
    mine = load(model, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    if chosen is not None:
        from qgen.calibration.texts import Texts
        from qgen.engine import quantize

        quantize(mine, chosen, calibration=Texts(tokenizer, fit, 256) if fit else None, progress=False)
    found = evaluate_text(mine, tokenizer, documents, theirs, seed=seed)
    about = {
        "model": model,
        "reference": base or "none",
        "recipe": recipe or "as saved",
        "text": f"{text.name}, {len(documents)} paragraphs" + (f", calibrated on {len(fit)} others" if fit else ""),
    }
    return Result(found, about=about, model=mine if _quantized(mine) else None)


def write(ctx: typer.Context, result: Result, out: Path | None) -> None:
    """The table on stdout; scores.json, report.html and, with pictures, before_after.png in `out`."""
    from qgen.eval.page import clipped, evaluation_report
    from qgen.show.pictures import difference, grid

    typer.echo(result.scores.table())
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(result.scores.to_json() + "\n", encoding="utf-8")
    if result.pictures:
        captions, before, after = zip(*result.pictures, strict=True)
        lines = [("reference", before), ("model", after)]
        lines.append(("difference\ntimes 4", [difference(a, b) for a, b in zip(before, after, strict=True)]))
        grid(lines, [clipped(c) for c in captions], "Same prompts, same noise").save(out / "before_after.png")
    title = f"Evaluation of {result.about.get('model', Path(next(iter(result.about.values()), 'a model')).name)}"
    evaluation_report(
        out / "report.html",
        result.scores,
        pictures=result.pictures,
        commands=[typed(ctx)],
        title=title,
        about=result.about,
        model=result.model,
    )
    typer.echo(f"wrote {out}")


def extractors_from(words: str) -> Any:
    """ "auto", or "fid=inception:/path,clip=cliplite" as a mapping."""
    if "=" not in words:
        return words
    pairs = [part.partition("=") for part in words.split(",") if part.strip()]
    return {metric.strip(): name.strip() or "auto" for metric, _, name in pairs}


def is_picture_folder(name: str) -> bool:
    """Whether this is a local folder without a model in it."""
    folder = Path(name)
    return folder.is_dir() and not any((folder / file).is_file() for file in ("model_index.json", "config.json"))


def several(ctx: typer.Context, processes: int, device: str) -> None:
    """The same command in several processes; ends with the exit code of the first that fails."""
    from qgen.cli.processes import relaunch

    code = relaunch(ctx.meta.get(TYPED, []), processes, cpu=not _device(device).startswith("cuda"))
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def _drawn(job: Job, which: str, name: str, pipe: Any, prompts: list[str]) -> Any:
    """Pictures rounded to 8 bits, whichever way they are drawn, so that every way gives the same numbers."""
    import torch

    from qgen.eval.generate import generate
    from qgen.eval.images import as_images
    from qgen.eval.resume import generate_into

    if job.ray is not None:
        from qgen.eval.ray_draw import draw_on_ray

        address = None if job.ray == "local" else job.ray
        make = functools.partial(load, name, job.dtype, job.device)
        gpus = 1 if _device(job.device).startswith("cuda") else 0
        where = job.out / "samples" / which
        return draw_on_ray(make, prompts, where, workers=job.workers, gpus=gpus, address=address, **job.draw)
    if job.out is not None:
        return generate_into(job.out / "samples" / which, pipe, prompts, **job.draw)
    return as_images(generate(pipe, prompts, dtype=torch.uint8, **job.draw))


def _device(name: str) -> str:
    """ "auto" inside one of several processes is the process's own GPU."""
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name if name != "auto" else "cpu"


def _npz(path: Path) -> list[Path]:
    found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path} holds no .npz files")
    return found


def _quantized(model: Any) -> bool:
    from qgen.errors import NotQuantizable
    from qgen.show.rows import gather

    try:
        return len(gather(model)) > 0
    except NotQuantizable:
        return False
