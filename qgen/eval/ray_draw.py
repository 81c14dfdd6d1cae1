"""Drawing on several machines through Ray; work that a dying worker takes with it is done again by another.

    draw_on_ray(lambda: load("model"), prompts, "pictures", workers=8, gpus=1, address="auto")

The driver hands out batches, gets 8-bit pictures back and keeps them in its own folder (qgen.eval.store), so machines need not share a
disk and a killed driver goes on where it stopped. Batches are cut as in `generate_into`, whoever draws them: the pictures are the same.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.errors import QgenError
from qgen.eval.fingerprint import fingerprint
from qgen.eval.generate import checked, generate, progress_bar
from qgen.eval.resume import plan, settings_of
from qgen.eval.store import Store

__all__ = ["draw_on_ray"]

log = logging.getLogger("qgen")


class Painter:
    """What runs in a worker: a pipeline, loaded once."""

    def __init__(self, make: Callable[[], Any]):
        self.pipe = make()

    def fingerprint(self) -> str:
        return fingerprint(self.pipe)

    def draw(self, prompts: list[str], call: dict[str, Any]) -> Any:
        return generate(self.pipe, prompts, progress=False, dtype=torch.uint8, **call).numpy()


def draw_on_ray(
    make: Callable[[], Any],
    prompts: Sequence[str],
    folder: str | Path,
    *,
    workers: int = 2,
    gpus: float = 0,
    address: str | None = None,
    tries: int = 3,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Returns what `generate_into` returns, drawn by `workers` processes of a Ray cluster.

    Arguments:
        make: loads the pipeline; called once in every worker, whose machine must have the files.
        gpus: GPUs per worker. address: of a running cluster, "auto" for the one nearby; default: a cluster on this machine alone.
        tries: how often a batch is attempted before its loss is an error.

    Raises QgenError if ray is not installed or a batch is lost `tries` times; an error of the pipeline itself is raised as it is.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise QgenError("drawing on several machines needs the package ray: pip install ray") from error
    prompts = checked(prompts, batch_size)
    if workers < 1 or tries < 1:
        raise ValueError(f"workers and tries must be at least 1, found {workers} and {tries}")
    ours = not ray.is_initialized()
    if ours:
        local = {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
        ray.init(log_to_driver=False, **local)
    try:
        call = {"steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size, **options}
        crew = Crew(ray, make, gpus, tries, call)
        store = Store(folder, settings_of(crew.fingerprint(), steps, guidance, seed, batch_size, options))
        batches = [[p for p in batch if not store.finished(p)] for batch in plan(prompts, batch_size)]
        with progress_bar(sum(map(len, batches)), progress) as bar:
            for batch, pictures in crew.run([batch for batch in batches if batch], workers):
                store.add(batch, pictures)
                bar.update(len(batch))
        return store.read(prompts)
    finally:
        if ours:
            ray.shutdown()


class Crew:
    """Workers that are replaced when they die."""

    def __init__(self, ray: Any, make: Callable[[], Any], gpus: float, tries: int, call: dict[str, Any]):
        self.ray, self.tries, self.call = ray, tries, call
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Painter)
        self.hire = lambda: kind.remote(make)
        self.first = self.hire()

    def fingerprint(self) -> str:
        """Of the model that a worker has loaded."""
        return self._get(self.first.fingerprint.remote())

    def run(self, batches: list[list[str]], workers: int) -> Any:
        """Yields (batch, pictures uint8) in the order in which they come back."""
        waiting = deque(enumerate(batches))
        lost = [0] * len(batches)
        idle = [self.first, *(self.hire() for _ in range(min(workers, len(batches)) - 1))]
        busy: dict[Any, tuple[Any, int]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, (i, batch) = idle.pop(), waiting.popleft()
                busy[worker.draw.remote(batch, self.call)] = (worker, i)
            done, _ = self.ray.wait(list(busy), num_returns=1)
            worker, i = busy.pop(done[0])
            try:
                pictures = self._get(done[0])
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError) as error:
                lost[i] += 1
                if lost[i] >= self.tries:
                    raise QgenError(f"a batch was lost {lost[i]} times with its worker: {_line(error)}") from error
                log.warning("a worker died; its %d pictures go to another", len(batches[i]))
                waiting.appendleft((i, batches[i]))
                idle.append(self.hire())
                continue
            idle.append(worker)
            yield batches[i], torch.from_numpy(pictures.copy())

    def _get(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(getattr(error, "cause", None), Exception) else error from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
