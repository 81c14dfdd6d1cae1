"""`qgen bench peers`: the same pipeline through qgen's recipes and through other people's quantizers, in one table and one plot."""

from pathlib import Path
from typing import Annotated, Any

import typer

bench = typer.Typer(no_args_is_help=True, help="Compare with other quantizers on this computer.")


@bench.callback()
def _group() -> None:
    """Compare with other quantizers on this computer."""


@bench.command()
def peers(
    ctx: typer.Context,
    pipeline: Annotated[str, typer.Option(help="Folder, hub id, or the word demo for the one that ships.")] = "demo",
    chosen: Annotated[
        str,
        typer.Option(
            "--peers",
            help="Commas between: qgen, torchao, bitsandbytes, quanto, modelopt, comfy-kitchen, gguf, sdnq, unquantized; or single configs "
            "such as qgen:svdquant-*,bitsandbytes:nf4. Default: all. A peer that is not installed says so in its row.",
        ),
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="The first n prompts.")] = 16,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for peers.md, .json and .csv, pictures/peers.png, and for finished rows, which are kept."
        ),
    ] = Path("build/peers"),
    prompts: Annotated[
        str | None, typer.Option(help="As in `qgen eval`; the demo pipeline has its own held-out ones.")
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(
            help="PEER=PATH: run this peer by another environment's Python, which needs torch, diffusers and the peer, not qgen; "
            "repeatable. So peers whose requirements quarrel can be compared: python -m venv E; E/bin/pip install torchao diffusers "
            "transformers accelerate; qgen bench peers --python torchao=E/bin/python",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure finished rows again.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for a row; then it is stopped and says so.")] = 1800,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of all noise; every row draws from the same.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the 16-bit pipeline: bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    samples: Annotated[int, typer.Option(min=1, help="Calibration prompts, for all that calibrate.")] = 64,
    keep: Annotated[int, typer.Option(min=1, help="Denoiser calls kept per calibration prompt.")] = 4,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of pictures drawn for the time.")] = 9,
    threads: Annotated[int, typer.Option(min=0, help="Of torch on the CPU; 0: its own choice.")] = 0,
    extractor: Annotated[str, typer.Option(help="As in `qgen eval`.")] = "auto",
) -> None:
    """Quantize one pipeline in many ways, each in its own process; run again after a crash and finished rows are kept."""
    import shutil

    from rich.console import Console

    from qgen.bench.peer import select
    from qgen.bench.table import LIMIT, notes, rich_table
    from qgen.cli.evaluate_kinds import extractors_from
    from qgen.show.rows import printable

    pairs_of = select([name.strip() for name in chosen.split(",") if name.strip()])
    pythons = _pythons(python or [])
    work = _bench(pipeline, prompts, n, dtype, device, extractors_from(extractor))
    shared = {"steps": steps, "seed": seed, "samples": samples, "keep": keep, "pairs": pairs, "threads": threads}
    work["job"] = _replace(work["job"], **shared)
    if fresh:
        shutil.rmtree(out / "rows", ignore_errors=True)
    rows = _measure(work, pairs_of, out, pythons, timeout)
    _write(ctx, rows, out, work)
    Console().print(rich_table(rows))
    failed = [f"{row.name} failed: {printable(' '.join(row.error.split()), LIMIT)}" for row in rows if row.error]
    for line in [*failed, *notes(rows)]:
        typer.echo(line)
    typer.echo(f"peers.md, peers.json, peers.csv and pictures/peers.png are in {out}")


def _bench(pipeline: str, prompts: str | None, n: int, dtype: str, device: str, extractor: Any) -> dict[str, Any]:
    """The job that all rows share, the prompt set, and the metrics whose networks are here."""
    from qgen.bench.job import Job
    from qgen.bench.run import METRICS
    from qgen.cli.common import device_of, note
    from qgen.eval.extractors import MissingWeights
    from qgen.eval.metrics import Shots, check_early
    from qgen.eval.prompt_sets import load_prompts
    from qgen.show.report import version

    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"--dtype is bfloat16 or float16, found {dtype!r}: bytes are compared with a 16-bit pipeline")
    if prompts is None and pipeline != "demo":
        raise ValueError(
            "--prompts SET is wanted, such as builtin or a file; a few dozen give an interval that says something"
        )
    found = load_prompts(prompts or "demo", n)
    metrics = []
    for name in METRICS:
        try:
            check_early([name], Shots((), (), (), None, extractor))
            metrics.append(name)
        except MissingWeights as error:
            note(f"without {name}: {str(error).splitlines()[0]}")
    place = str(Path(pipeline).resolve()) if Path(pipeline).exists() else pipeline
    job = Job("", "", place, tuple(found.prompts), dtype=dtype, device=device_of(device), qgen=version())
    return {"job": job, "set": found, "metrics": metrics, "extractor": extractor}


def _replace(job: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(job, **changes)


def _pythons(given: list[str]) -> dict[str, str]:
    from qgen.bench.peer import peers as known

    pairs = {}
    for text in given:
        peer, _, path = text.partition("=")
        if not path:
            raise ValueError(f"--python takes PEER=PATH, such as torchao=env/bin/python; found {text!r}")
        known[peer]  # an unknown name is an error here, with the nearest known one
        where = Path(path).expanduser().absolute()  # not resolved: a virtual environment's Python is a link
        if not where.is_file():
            raise ValueError(f"--python {text}: no file {where}; the path of an environment's interpreter is wanted")
        pairs[peer] = str(where)
    return pairs


def _measure(work: dict[str, Any], chosen: list, out: Path, pythons: dict[str, str], timeout: float) -> list:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from qgen.bench.run import Bench

    ready = Bench(out, work["job"], pythons, timeout, work["extractor"], work["metrics"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=len(chosen))
        for row in ready.rows(chosen, begin=lambda name: bar.update(task, description=name)):
            rows.append(row)
            bar.advance(task)
            if row.error:
                bar.console.print(f"{row.name}: {row.error}"[:300], markup=False, style="red")
    return rows


def _write(ctx: typer.Context, rows: list, out: Path, work: dict[str, Any]) -> None:
    from qgen.bench.page import markdown
    from qgen.bench.plot import plot
    from qgen.bench.table import as_csv, as_json, points
    from qgen.cli.common import TYPED

    words = list(ctx.meta.get(TYPED, []))
    page, about = markdown(rows, work["job"], work["set"], words)
    (out / "peers.md").write_text(page, encoding="utf-8")
    (out / "peers.json").write_text(as_json(rows, about) + "\n", encoding="utf-8")
    (out / "peers.csv").write_text(as_csv(rows), encoding="utf-8")
    shown = points(rows)
    if shown:
        plot(shown, out / "pictures" / "peers.png", f"{about['pipeline']}, {about['prompts']}")
