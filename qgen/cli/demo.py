"""`qgen demo`: the built-in pipeline at 16 bits and at 4 bits, from the same prompts and the same noise, in pictures and numbers.

before_after.png    16-bit, each recipe, and its difference; one column per prompt, the first held-out prompts, none picked
report.html         of the last recipe, with scores of all; report-<recipe>.html of the others
scores.json         everything in the printed table, with intervals and settings
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

METRICS = ("psnr", "ssim", "lpips", "fid", "clip")
COLUMNS = 6  # prompts in the picture


@dataclass
class Run:
    """What one recipe, or the 16-bit original, gave. nbytes: of the denoiser. seconds: to quantize, and per picture."""

    name: str
    pictures: Any
    nbytes: int
    draw_seconds: float
    scores: Any
    denoiser: Any = None
    quantize_seconds: float | None = None
    output_sqnr_db: float | None = None


def demo(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for before_after.png, report.html and scores.json; overwritten.")
    ] = Path("build/demo"),
    recipe: Annotated[
        list[str] | None, typer.Option(help="Name or .json file; repeatable. Default: rtn-int4 and svdquant-int4.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to draw and score.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps, in calibration and in drawing.")] = 20,
    samples: Annotated[int, typer.Option(min=1, help="Calibration prompts.")] = 64,
    keep: Annotated[int, typer.Option(min=1, help="Denoiser calls kept per batch of eight calibration prompts.")] = 4,
    seed: Annotated[int, typer.Option(help="Of all noise; every recipe draws from the same.")] = 0,
) -> None:
    """Quantize the built-in pipeline and compare pictures before and after, on any computer, without a download."""
    from rich.console import Console

    from qgen.cli.common import device_of, load, note, read_recipe, typed
    from qgen.demo import demo_prompts

    start = time.perf_counter()
    chosen = [read_recipe(name, device_of("cpu")) for name in recipe or ("rtn-int4", "svdquant-int4")]
    pipe = load("demo", device="cpu")
    asked = demo_prompts("held_out")[:prompts]
    metrics = _metrics()
    draw = {"steps": steps, "seed": seed}
    note(f"drawing {len(asked)} pictures at 16 bits")
    reference = _draw(pipe, asked, draw, "16-bit", metrics=[m for m in metrics if m == "clip"])
    calls = _record(pipe, samples, keep, steps, seed)
    runs = [reference]
    original = pipe.transformer
    for item in chosen:
        note(f"quantizing with {item.name}")
        pipe.transformer = copy.deepcopy(original)
        seconds = _quantize(pipe, item, calls, seed)
        run = _draw(pipe, asked, draw, item.name, metrics, reference.pictures)
        run.denoiser, run.quantize_seconds = pipe.transformer, seconds
        runs.append(run)
    settings = {
        "prompts": prompts,
        "steps": steps,
        "samples": samples,
        "keep": keep,
        "seed": seed,
        "command": typed(ctx),
    }
    _write(out, runs, asked, settings)
    Console().print(_table(runs))
    typer.echo(f"before_after.png, report.html and scores.json are in {out}; {time.perf_counter() - start:.0f} s")


def _metrics() -> list[str]:
    """Metrics whose networks are on this computer; what is missing is said."""
    from qgen.cli.common import note
    from qgen.eval.extractors import MissingWeights, find_extractor

    found = []
    for name in METRICS:
        try:
            if name not in ("psnr", "ssim"):
                find_extractor(name, "auto")
            found.append(name)
        except MissingWeights as error:
            note(f"without {name}: {str(error).splitlines()[0]}")
    return found


def _record(pipe: Any, samples: int, keep: int, steps: int, seed: int) -> dict:
    from qgen.calibration.recorder import Recorder
    from qgen.demo import demo_prompts
    from qgen.progress import bars

    # Batches of 8: as many runs as there are batches, so that a fifth of them can be held out.
    recorder = Recorder(samples, keep, batch=min(8, max(1, samples // 2)))
    options = {"num_inference_steps": steps}
    denoisers = {"transformer": pipe.transformer}
    return recorder.calls(
        pipe, denoisers, prompts=demo_prompts("calibration"), call_kwargs=options, seed=seed, progress=bars(True)
    )


def _quantize(pipe: Any, recipe: Any, calls: dict, seed: int) -> float:
    """Quantizes in place; seconds without the recording, which all recipes share."""
    from qgen.engine import quantize

    start = time.perf_counter()
    quantize(pipe, recipe, calibration=calls, seed=seed)
    return time.perf_counter() - start


def _draw(pipe: Any, asked: list[str], draw: dict, name: str, metrics: list[str], reference: Any = None) -> Run:
    from qgen.eval.evaluate import evaluate
    from qgen.eval.generate import generate

    start = time.perf_counter()
    pictures = generate(pipe, asked, **draw)
    seconds = (time.perf_counter() - start) / len(asked)
    scores = (
        evaluate(pictures, reference=reference, prompts=asked, metrics=metrics, seed=draw["seed"]) if metrics else None
    )
    if reference is None:
        return Run(name, pictures, sum(2 * p.numel() for p in pipe.transformer.parameters()), seconds, scores)
    from qgen.show.rows import gather

    totals = gather(pipe.transformer).totals
    output = next(iter(totals["output_sqnr_db"].values()), None)
    return Run(name, pictures, totals["nbytes"], seconds, scores, output_sqnr_db=output)


def _write(out: Path, runs: list[Run], asked: list[str], settings: dict) -> None:
    from qgen.show.pictures import difference, grid
    from qgen.show.report import environment, report

    out.mkdir(parents=True, exist_ok=True)
    first, *others = runs
    count = min(COLUMNS, len(asked))
    rows = [(f"16-bit\n{first.nbytes / 2**20:.1f} MiB", first.pictures[:count])]
    for run in others:
        rows.append((f"{run.name}\n{run.nbytes / 2**20:.1f} MiB", run.pictures[:count]))
        rows.append(
            (
                "difference\ntimes 4",
                [difference(a, b) for a, b in zip(first.pictures[:count], run.pictures, strict=False)],
            )
        )
    grid(rows, asked[:count], "Same prompts, same noise: 16-bit, 4-bit, and what changed").save(
        out / "before_after.png"
    )
    scores = {run.name: run.scores for run in runs if run.scores is not None}
    for run in others:
        name = "report.html" if run is others[-1] else f"report-{run.name}.html"
        pairs = list(zip(asked, first.pictures, run.pictures, strict=True))[:count]
        title = f"Demo pipeline, {run.name}"
        report(run.denoiser, out / name, pictures=pairs, scores=scores, commands=[settings["command"]], title=title)
    data = {"settings": settings, "environment": environment(), "runs": [_plain(run) for run in runs]}
    (out / "scores.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(run: Run) -> dict:
    facts = {key: getattr(run, key) for key in ("name", "nbytes", "quantize_seconds", "draw_seconds", "output_sqnr_db")}
    return {**facts, "scores": None if run.scores is None else json.loads(run.scores.to_json())}


def _table(runs: list[Run]) -> Any:
    """One column per model, so that it fits narrow terminals whatever the networks are called."""
    from rich.table import Table

    found = [{row.metric: row for row in run.scores.rows} if run.scores else {} for run in runs]
    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column(f"{len(runs[0].pictures)} pictures")
    for run in runs:
        grid.add_column(run.name, justify="right", overflow="fold")
    for metric in METRICS:
        rows = [scores.get(metric) for scores in found]
        first = next(filter(None, rows), None)
        if first is not None:
            label = f"{first.label}{f', {first.unit}' if first.unit else ''} {'↑' if first.better == 'higher' else '↓'}"
            grid.add_row(label, *("" if row is None else f"{row.value:.4g}" for row in rows))
    facts = {
        "output SQNR, dB ↑": [(run.output_sqnr_db, "{:.1f}") for run in runs],
        "denoiser, MiB": [(run.nbytes / 2**20, "{:.2f}") for run in runs],
        "seconds to quantize": [(run.quantize_seconds, "{:.0f}") for run in runs],
        "seconds per picture, this computer": [(run.draw_seconds, "{:.2f}") for run in runs],
    }
    for label, values in facts.items():
        grid.add_row(label, *("" if value is None else form.format(value) for value, form in values))
    return grid
