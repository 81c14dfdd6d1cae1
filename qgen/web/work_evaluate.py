"""An evaluate job, in its own process: both models draw the same prompts from the same noise, batch by batch, and the pictures are scored.

PSNR and SSIM of what is drawn so far are shown after every batch; the other metrics follow when all pictures are there. A metric that
cannot be computed (its network is not on this computer, one picture is no set) is a row that says why, and the others go on.
"""

__all__ = ["evaluate"]

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qgen.web.evaluation_files import BATCH, worst, written

_LIVE = ("psnr", "ssim")


def evaluate(asked: dict[str, Any], folder: Path, device: str, report: Any) -> dict[str, Any]:
    """{"rows": one dict per metric, "failed": {metric: why}, "per_prompt", "prompts", "files", "worst"}."""
    before, after = _pair(asked, device, report)
    pictures = _draw(asked, before, after, report)
    scores, failed = _score(asked, *pictures, report)
    report.step("writing the report")
    files = written(asked, folder, after, scores, failed, *pictures)
    data = json.loads(scores.to_json())
    return {
        "rows": data["rows"], "failed": failed, "per_prompt": data["per_prompt"], "prompts": asked["prompts"], "files": files,
        "worst": worst(folder, scores, asked["prompts"], *pictures),
    }  # fmt: skip


def _pair(asked: dict[str, Any], device: str, report: Any) -> tuple[Any, Any]:
    """Both pipelines, apart from each other."""
    from qgen.engine import quantize
    from qgen.named import load

    report.step(f"loading {asked['base']}")
    before = load(asked["base"], device=device)
    if not hasattr(before, "components"):
        raise ValueError(f"{asked['base']} is a bare model, which draws nothing by itself; a pipeline is wanted")
    report.step("loading the 4-bit model")
    if asked.get("folder"):
        after = load(asked["folder"], device=device)
    else:
        after = load(asked["base"], device=device)
        quantize(after, asked["recipe"], progress=False)
    for pipe in (before, after):
        pipe.set_progress_bar_config(disable=True)
    return before, after


def _draw(asked: dict[str, Any], before: Any, after: Any, report: Any) -> tuple[Any, Any]:
    """Pictures of the 4-bit and of the 16-bit model, (n, H, W, 3); live rows on the way."""
    import torch

    from qgen.eval.evaluate import evaluate as score
    from qgen.eval.generate import generate

    prompts, live = asked["prompts"], [name for name in _LIVE if name in asked["metrics"]]
    mine, theirs = [], []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        options = {"steps": asked.get("steps"), "seed": asked.get("seed", 0), "batch_size": BATCH, "progress": False}
        for parts, pipe, words in ((theirs, before, "16 bits"), (mine, after, "4 bits")):
            report.step(f"drawing at {words}", start, len(prompts))
            parts.append(generate(pipe, batch, **options))
        report.step("drawing", start + len(batch), len(prompts))
        if live:
            drawn = prompts[: start + len(batch)]
            rows = score(torch.cat(mine), torch.cat(theirs), drawn, metrics=live, progress=False)
            report.show(rows=json.loads(rows.to_json())["rows"], drawn=len(drawn), of=len(prompts))
    return torch.cat(mine), torch.cat(theirs)


def _score(asked: dict[str, Any], mine: Any, theirs: Any, report: Any) -> tuple[Any, dict[str, str]]:
    """All scores as one `Scores`, and by metric why it is missing. The error of the first metric if every one failed."""
    from qgen.errors import QgenError
    from qgen.eval.evaluate import evaluate as score

    found, failed, first = [], {}, None
    for number, name in enumerate(asked["metrics"]):
        report.step(f"scoring {name}", number, len(asked["metrics"]))
        try:
            options = {"extractor": asked["extractor"], "real": asked.get("real"), "seed": asked.get("seed", 0)}
            found.append(score(mine, theirs, asked["prompts"], metrics=[name], progress=False, **options))
        except (QgenError, ValueError, OSError, ImportError) as error:
            first, failed[name] = first or error, " ".join(str(error).split())[:600]
            report.say(f"{name}: {failed[name]}")
        rows = [row for scores in found for row in json.loads(scores.to_json())["rows"]]
        report.show(rows=rows, failed=failed, drawn=len(mine), of=len(mine))
    if not found:
        raise first
    values = {name: given for scores in found for name, given in scores.per_prompt.items()}
    settings = {
        "steps": asked.get("steps"),
        "seed": asked.get("seed", 0),
        "reference": asked["base"],
        "model": asked["label"],
    }
    rows = tuple(row for scores in found for row in scores.rows)
    return replace(found[0], rows=rows, per_prompt=values, settings=settings), failed
