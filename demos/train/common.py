"""What the training scripts share: pictures, a clock that counts CPU minutes, averaged weights, contact sheets."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["PERMISSIVE", "Average", "Emoji", "ask", "budget", "contact_sheet", "descend", "load_emoji", "words"]

# Noto, Noto v1 ("blob") are Apache-2.0, Fluent ("flat", "fluent") is MIT.
PERMISSIVE = ("noto", "blob", "flat", "fluent")


@dataclass(frozen=True)
class Emoji:
    """Pictures (n, 64, 64, 3) uint8, and for each a dict with name, style, group and tags."""

    pictures: np.ndarray
    about: list[dict]

    def tensor(self) -> Tensor:
        """(n, 3, 64, 64) float32 in [-1, 1]."""
        return torch.from_numpy(self.pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_emoji(data: Path, styles: Iterable[str], groups: Iterable[str] | None = None) -> Emoji:
    """Reads what rasterize.py wrote, and keeps the styles and groups asked for."""
    about = json.loads((data / "emoji64.json").read_text(encoding="utf-8"))
    pictures = np.load(data / "emoji64.npz", allow_pickle=False)["images"]
    styles, groups = set(styles), None if groups is None else set(groups)
    keep = [i for i, a in enumerate(about) if a["style"] in styles and (groups is None or a["group"] in groups)]
    if not keep:
        raise ValueError(f"no pictures of styles {sorted(styles)} and groups {groups} in {data}")
    return Emoji(pictures[keep], [about[i] for i in keep])


def words(text: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return re.sub(r"[^a-z0-9 ]+", " ", text.lower()).split()


def budget(cpu_minutes: float) -> Iterator[float]:
    """Yields the fraction of the budget spent, from 0 to below 1; CPU time, so a busy computer cuts nothing short."""
    start = time.process_time()
    while (spent := (time.process_time() - start) / (60 * cpu_minutes)) < 1:
        yield spent


def cosine(spent: float, step: int, warmup: int, hold: float = 0.1, floor: float = 0.03) -> float:
    """Learning-rate factor: linear warm-up over steps, flat, then half a cosine over the rest of the budget."""
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, (spent - hold) / (1 - hold))))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * fall)


class Average:
    """Exponential average of parameters; `swap` exchanges it with the live ones, twice restores them."""

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.live, self.decay, self.steps = list(parameters), decay, 0
        self.mean = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 20))  # young averages forget their random start
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)


def descend(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    loss_of: Callable[[], Tensor],
    cpu_minutes: float,
    rate: float,
    warmup: int,
    every: int,
) -> list[tuple[int, float]]:
    """Trains until the budget is spent, leaves the averaged weights in the parameters; (step, smoothed loss) at every so many steps."""
    parameters = list(parameters)
    average, log, mean = Average(parameters, 0.998), [], None
    for step, spent in enumerate(budget(cpu_minutes)):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(spent, step, warmup)
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % every == every - 1:
            log.append((step + 1, mean))
            print(f"step {step + 1}, {100 * spent:.0f} %, loss {mean:.4f}", flush=True)
    print(f"{average.steps} steps, loss {mean:.4f}")
    average.swap()
    return log


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], path: Path, scale: int = 2, gap: int = 4) -> None:
    """Saves rows of pictures (64, 64, 3) uint8 as one PNG."""
    from PIL import Image

    side = rows[0][0].shape[0] * scale
    width, height = (count * (side + gap) for count in (max(map(len, rows)), len(rows)))
    sheet = Image.new("RGB", (width, height), (200, 200, 200))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (j * (side + gap), i * (side + gap)))
    sheet.save(path)


def ask(description: str | None, cpu_minutes: float | None, out: str):
    """An argument parser with what every script takes: --data, --out, --seed, and --cpu-min if the script trains."""
    import argparse

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"), help="folder that rasterize.py wrote")
    parser.add_argument("--out", type=Path, default=Path(out), help="where the result goes")
    parser.add_argument("--seed", type=int, default=0)
    if cpu_minutes is not None:
        parser.add_argument("--cpu-min", type=float, default=cpu_minutes, help="budget in CPU minutes of one core")
    return parser
