"""The process of one row: loads the pipeline, quantizes, saves, counts, draws, times. Run as a program by `qgen.bench.run`.

    FOLDER/job.json         what to do
    FOLDER/pictures/*.png   one per prompt, in order
    FOLDER/result.json      {"measured": …} or {"error": …}, written last

The 16-bit denoiser stays in the pipeline while the peer works on a copy, so that calibration and the paired times use the original.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import os
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qgen.bench.bits import Size, count
from qgen.bench.job import Job
from qgen.bench.measure import Rise, paired
from qgen.bench.peer import Part, Peer, peers

__all__ = ["main", "measure", "parts_of"]


def main(folder: str) -> None:
    """Does FOLDER/job.json; errors go to result.json in words and to stderr with their traceback."""
    where = Path(folder)
    job = Job.from_json((where / "job.json").read_text(encoding="utf-8"))
    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        result = {"measured": measure(job, where)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__}
    stage = where / ".result.json"
    stage.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    os.replace(stage, where / "result.json")


def measure(job: Job, where: Path) -> dict[str, Any]:
    """Everything that a row says but its scores; pictures go to `where`/pictures. Raises whatever the peer raises."""
    from qgen.eval.generate import generate
    from qgen.named import load
    from qgen.show.report import version

    if job.qgen and version() != job.qgen:
        raise RuntimeError(f"this environment has qgen {version()}, the table is made by {job.qgen}: install the same")
    peer = peers[job.peer]()
    found = {"qgen": version(), "torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}
    if peer.package and job.peer != "qgen":
        found[peer.package] = peer.version()
    pipe = load(job.pipeline, job.dtype, job.device)
    originals, parts = parts_of(pipe, job)
    torch.manual_seed(job.seed)
    start = _now()
    with Rise() as rise:
        made = {name: peer.quantize(job.config, part) for name, part in parts.items()}
    seconds = _now() - start
    size = _saved(peer, job.config, made, parts)
    options = {"steps": job.steps, "seed": job.seed, "batch_size": job.batch_size, "dtype": torch.uint8}
    _put(pipe, made)
    _keep(generate(pipe, job.prompts, **options), where / "pictures")

    def draw(modules: dict[str, Any]) -> None:
        _put(pipe, modules)
        generate(pipe, job.prompts[:1], progress=False, **{**options, "batch_size": 1})

    times = paired(lambda: draw(originals), lambda: draw(made), job.pairs)
    asked = sum(len(part.layers) for part in parts.values())
    return {
        "bits": size.bits, "nbytes": size.nbytes + size.other, "layer_bytes": size.nbytes, "weights": size.weights, "file": size.file,
        "asked": asked, "layers": asked - len(size.left), "left": list(size.left), "more": list(size.more), "seconds": seconds,
        "peak": rise.nbytes, "latency": asdict(times), "versions": found, "threads": torch.get_num_threads(),
    }  # fmt: skip


def parts_of(pipe: Any, job: Job) -> tuple[dict[str, Any], dict[str, Part]]:
    """({name: original denoiser}, {name: Part}). Layers: the linear layers that qgen's default recipe quantizes, by its probe."""
    from qgen import recipes
    from qgen.calibration.recorder import Recorder
    from qgen.models import adapter_for
    from qgen.nn.kinds import is_layer
    from qgen.probe import probe

    adapter = adapter_for(pipe)
    originals = adapter.denoisers(pipe)
    options = {"num_inference_steps": job.steps} if job.steps else {}
    prompts = getattr(pipe, "calibration_prompts", None)

    def record(samples: int, keep: int) -> dict[str, Any]:
        return Recorder(samples, keep).calls(pipe, originals, prompts, options, job.seed)

    one, every = record(1, 1), functools.cache(lambda: record(job.samples, job.keep))
    recipe = recipes.get("svdquant-int4").skip(*adapter.keep_float())
    parts = {}
    for name, module in originals.items():
        if name not in one:
            continue  # never called at these steps: everybody leaves it alone
        sites = [s for s in probe(module, one[name].calls[0]) if s.kind == "linear" and recipe.spec_for(s)]
        layers = {s.path: tuple(s.shape) for s in sites}
        keep = tuple(path for path, layer in module.named_modules() if is_layer(layer) and path not in layers)
        vectors = frozenset(s.path for s in sites if s.role == "vector")
        calls = functools.partial(lambda name: every()[name], name)
        parts[name] = Part(copy.deepcopy(module), layers, vectors, keep, one[name], calls, job.seed)
    return {name: originals[name] for name in parts}, parts


def _saved(peer: Peer, config: str, made: dict[str, Any], parts: dict[str, Part]) -> Size:
    """Sizes of the denoisers as the peer saves them, summed."""
    total = Size(0, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            place = Path(folder) / (name or "model")
            peer.save(config, made[name], place)
            total += count(place, part.layers, part.keep)
    return total


def _put(pipe: Any, modules: dict[str, Any]) -> None:
    for name, module in modules.items():
        setattr(pipe, name, module)


def _keep(pictures: torch.Tensor, folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(folder / f"{i:05d}.png")


def _now() -> float:
    import time

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(sys.argv[1])
