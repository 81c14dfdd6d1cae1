"""`qgen eval MODEL --reference MODEL`: draws with both from the same noise, and scores what came out."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The model to score: a folder, quantized or not, a hub id, or the word demo.")
    ],
    reference: Annotated[
        str, typer.Option(help="The 16-bit model to compare with: a folder, a hub id, or the word demo.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line; the demo model has its own.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Draw the first n prompts only.")] = None,
    metrics: Annotated[
        str, typer.Option(help="Of psnr, ssim, sqnr, lpips, fid, kid, clip, commas between.")
    ] = "psnr,ssim,lpips,fid,clip",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps; default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the noise; both models get the same.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16; auto keeps what the files hold.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.json, before_after.png and, if quantized, report.html.")
    ] = None,
) -> None:
    """Score a model's pictures against a reference's, drawn from the same noise."""
    from qgen.cli.common import load, note, own_prompts, read_prompts, typed
    from qgen.errors import NotQuantizable
    from qgen.eval.evaluate import evaluate as score
    from qgen.eval.generate import generate
    from qgen.eval.metrics import metrics as known
    from qgen.show.pictures import difference, grid
    from qgen.show.report import report

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    for name in names:
        known[name]  # an unknown name is an error before anything is loaded
    asked = read_prompts(prompts)
    theirs = load(reference, dtype, device)
    asked = (asked or own_prompts(theirs, "held_out") or [])[:n]
    if not asked:
        raise ValueError("--prompts FILE is wanted: one prompt a line, a few dozen for an interval that says something")
    note(f"drawing {len(asked)} pictures with the reference")
    before = generate(theirs, asked, steps=steps, seed=seed)
    del theirs
    pipe = load(model, dtype, device)
    note(f"drawing {len(asked)} pictures with {model}")
    after = generate(pipe, asked, steps=steps, seed=seed)
    scores = score(after, reference=before, prompts=asked, metrics=names, seed=seed)
    typer.echo(scores.table())
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "scores.json").write_text(scores.to_json() + "\n", encoding="utf-8")
    shown = list(zip(asked, before, after, strict=True))[:6]
    lines = [
        ("reference", before[:6]),
        ("model", after[:6]),
        ("difference\ntimes 4", [difference(a, b) for _, a, b in shown]),
    ]
    grid(lines, [caption for caption, *_ in shown], "Same prompts, same noise").save(out / "before_after.png")
    try:
        report(pipe, out / "report.html", pictures=shown, scores=scores, commands=[typed(ctx)])
    except NotQuantizable:
        note(f"{model} is not quantized: no report.html")
    typer.echo(f"wrote {out}")
