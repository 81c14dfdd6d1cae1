"""Drawing that survives being killed, alone or shared among the processes that accelerate started.

    qgen.eval.generate_into("pictures", pipe, prompts)            # run it again after a crash: finished pictures stay

Prompts are cut into batches in their order, whatever is finished already. Of c processes that accelerate knows of, process r
draws batches r, r + c, r + 2c, … on its own device; then all wait for each other, and each may read the whole set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.eval.fingerprint import fingerprint
from qgen.eval.generate import checked, generate, progress_bar
from qgen.eval.store import Store

__all__ = ["Share", "generate_into", "my_share", "plan", "settings_of"]


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's: batches with index % count == rank. wait() returns when all are done."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def main(self) -> bool:
        return self.rank == 0


def my_share() -> Share:
    """This process's share: of one, or of as many as `accelerate launch`, torchrun or `qgen eval --processes` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Share()
    from datetime import timedelta

    from accelerate import PartialState

    # Processes finish far apart: the usual ten minutes at a barrier would end a long evaluation.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    return Share(state.process_index, state.num_processes, state.wait_for_everyone)


def generate_into(
    folder: str | Path,
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    share: Share | None = None,
    **options: Any,
) -> Tensor:
    """Returns what `generate` returns, rounded to 8 bits, having drawn only what `folder` does not hold already.

    Arguments: as `generate`; share: default `my_share()`. Raises ValueError if the folder belongs to another model or other
    settings.
    """
    prompts = checked(prompts, batch_size)
    share = my_share() if share is None else share
    settings = settings_of(pipe, steps, guidance, seed, batch_size, options)
    store = Store(folder, settings)
    batches = [batch for i, batch in enumerate(plan(prompts, batch_size)) if i % share.count == share.rank]
    call = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size, **options}
    with progress_bar(sum(map(len, batches)), progress and share.main) as bar:
        for batch in batches:
            todo = [prompt for prompt in batch if not store.finished(prompt)]
            if todo:
                store.add(todo, generate(pipe, todo, progress=False, dtype=torch.uint8, **call))
            bar.update(len(batch))
    share.wait()
    return store.read(prompts)


def plan(prompts: Sequence[str], batch_size: int) -> list[list[str]]:
    """Distinct prompts in their order, cut into batches; the same whatever is finished."""
    distinct = list(dict.fromkeys(prompts))
    return [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]


def settings_of(
    pipe: Any, steps: int | None, guidance: float | None, seed: int, batch_size: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the pictures, as JSON data. pipe: a pipeline, or its fingerprint."""
    model = pipe if isinstance(pipe, str) else fingerprint(pipe)
    said = {name: value if isinstance(value, _PLAIN) else repr(value) for name, value in sorted(options.items())}
    return {
        "model": model,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "batch_size": batch_size,
        "options": said,
    }


_PLAIN = (str, int, float, bool, type(None))
