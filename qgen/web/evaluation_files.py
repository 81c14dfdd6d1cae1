"""What an evaluate job leaves in its folder: tables for spreadsheets and programs, a printable page, the worst pairs as pictures.

scores.csv  per_prompt.csv  scores.json  report.html  prompts.txt  worst-0.png …
"""

__all__ = ["BATCH", "command_of", "worst", "written"]

import csv
import shlex
from pathlib import Path
from typing import Any

BATCH = 8  # pictures drawn at once
PICTURES = 6  # pairs in the report, the worst first
_COLUMNS = (
    "metric", "value", "low", "high", "reference", "difference", "difference_low", "difference_high", "n", "unit", "better", "flagged",
    "extractor", "digest", "note",
)  # fmt: skip


def written(
    asked: dict[str, Any], folder: Path, after: Any, scores: Any, failed: dict[str, str], mine: Any, theirs: Any
) -> list[str]:
    """Writes all files but the worst pairs, and returns their names."""
    from qgen.eval.page import evaluation_report

    (folder / "scores.json").write_text(scores.to_json() + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(asked["prompts"]) + "\n", encoding="utf-8")
    with open(folder / "scores.csv", "w", encoding="utf-8", newline="") as file:
        write = csv.writer(file)
        write.writerow(_COLUMNS)
        for row in scores.rows:
            write.writerow([getattr(row, name) for name in _COLUMNS])
        for name, why in failed.items():
            write.writerow([name, *[""] * (len(_COLUMNS) - 2), f"not measured: {why}"])
    with open(folder / "per_prompt.csv", "w", encoding="utf-8", newline="") as file:
        write = csv.writer(file)
        write.writerow(["prompt", *scores.per_prompt])
        for index, prompt in enumerate(asked["prompts"]):
            write.writerow([_cell(prompt), *(values[index] for values in scores.per_prompt.values())])
    shown = [(asked["prompts"][i], theirs[i], mine[i]) for i in _order(scores, len(mine))[:PICTURES]]
    about = {"model": asked["label"], "reference": asked["base"], "prompts": asked["set_name"]}
    about |= {"licence of the prompts": asked["licence"]}
    about |= {f"{name} was not measured": why for name, why in failed.items()}
    title = f"{asked['label']} against 16 bits"
    evaluation_report(
        folder / "report.html",
        scores,
        pictures=shown,
        commands=[command_of(asked)],
        title=title,
        about=about,
        model=after,
    )
    return ["scores.csv", "per_prompt.csv", "scores.json", "report.html", "prompts.txt"]


def command_of(asked: dict[str, Any]) -> str:
    """The same from the command line. MODEL stands for the folder of a model that a quantize job has made."""
    words = ["qgen", "eval"]
    if asked["recipe"]:
        words += [asked["base"], "--recipe", asked["recipe"]]
    else:
        words += ["MODEL", "--reference", asked["base"]]
    if asked["set"] == "held_out":
        words += ["--n", str(len(asked["prompts"]))]
    else:
        words += ["--prompts", "prompts.txt"]
    words += ["--metrics", ",".join(asked["metrics"]), "--batch-size", str(BATCH)]
    if asked["extractor"] != "auto":
        words += ["--extractor", asked["extractor"]]
    for name in ("steps", "seed", "real"):
        if asked.get(name):
            words += [f"--{name}", str(asked[name])]
    return shlex.join(words)


def worst(folder: Path, scores: Any, prompts: list[str], mine: Any, theirs: Any) -> list[dict[str, Any]]:
    """The pairs that differ most, as files: 16 bits, 4 bits, difference."""
    import numpy as np

    from qgen.show.pictures import difference, pixels
    from qgen.web.drawing import psnr, save

    made = []
    for place, index in enumerate(_order(scores, len(mine))[:PICTURES]):
        a, b = pixels(theirs[index]), pixels(mine[index])
        gap = np.full((a.shape[0], max(1, a.shape[1] // 32), 3), 255, np.uint8)
        save(np.hstack([a, gap, b, gap, difference(a, b)]), folder / f"worst-{place}.png", 3 * 192)
        db = psnr(a, b)
        made.append({"file": f"worst-{place}.png", "prompt": prompts[index], "psnr": db if np.isfinite(db) else None})
    return made


def _order(scores: Any, count: int) -> list[int]:
    """Numbers of pictures, the one that lost most first."""
    for name, values in scores.per_prompt.items():
        sign = 1 if scores[name].better == "higher" else -1
        return sorted(range(count), key=lambda i: sign * values[i])
    return list(range(count))


def _cell(text: str) -> str:
    """A spreadsheet must not take a prompt for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
