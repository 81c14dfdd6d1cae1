"""Pairs of pipelines, at 16 and at 4 bits, loaded once and shared by all visitors. Nobody writes to them.

    shipped:rtn-int4         quantized in memory when the server starts: under a second, no calibration
    shipped:svdquant-int4    calibrated once by a job in the background; later servers find it on disk
    job:ID                   what a visitor's own quantize job made

Both pipelines of a pair share text encoder and decoder, so that a pair takes one model and a 4-bit denoiser. All pairs of one 16-bit model
draw in one lane: they share its layers.
"""

__all__ = ["Models", "Pair", "Source"]

import copy
import hashlib
import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qgen.named import device_of, load
from qgen.web.child import run_in_child
from qgen.web.jobs import OPEN, Job, Jobs

QUICK, BEST = "rtn-int4", "svdquant-int4"
# Enough for the shipped pipeline to come close to its best, in well under a minute.
_CALIBRATION = {"samples": 64, "keep": 4, "seed": 0}
_LOADED = 2  # pairs kept in memory beside the shipped ones


@dataclass(frozen=True)
class Source:
    """A pair by name: the 16-bit model, and the folder of its 4-bit form or the recipe that makes it at once."""

    name: str
    label: str
    base: str
    folder: Path | None = None
    recipe: str | None = None

    @property
    def lane(self) -> str:
        return f"draw:{self.base}"


@dataclass
class Pair:
    """before: at 16 bits, after: at 4. denoisers: names of what was quantized. totals, kernels: as `qgen.summary` counts them."""

    before: Any
    after: Any
    denoisers: tuple[str, ...]
    totals: dict[str, Any]
    kernels: tuple[str, ...] = ()
    modules: list = field(default_factory=list)


class Models:
    """Finds, loads and keeps pairs. folder: where the calibrated shipped pipeline is kept. worker: the command that runs a job's folder."""

    def __init__(self, jobs: Jobs, folder: Path, device: str, worker: tuple[str, ...]):
        self.jobs, self.device, self.worker = jobs, device_of(device), worker
        self.folder = folder / f"shipped-{_key()}"
        self.preparing: Job | None = None
        self._pairs: dict[str, Pair] = {}
        self._bases: dict[str, Any] = {}
        self._lock = threading.RLock()

    @property
    def ready(self) -> bool:
        """Whether the calibrated shipped pipeline is there."""
        return (self.folder / "job.json").is_file()

    def prepare(self) -> Job | None:
        """Starts to calibrate the shipped pipeline, unless that was done before; returns the job."""
        if not self.ready and (self.preparing is None or self.preparing.state not in OPEN):
            asked = {"model": "demo", "recipe": BEST, "heat": True, **_CALIBRATION}
            self.preparing = self.jobs.submit("heavy:shipped", "quantize", asked, self._prepare)  # delays no visitor
        return self.preparing

    def choices(self, mine: list[str] | None = None) -> list[tuple[str, str]]:
        """(label, name) of the pairs that a visitor may choose, the best first."""
        found = [(f"Shipped, {BEST}", f"shipped:{BEST}")] if self.ready else []
        found.append((f"Shipped, {QUICK} (plain)", f"shipped:{QUICK}"))
        for name in mine or []:
            job = self.jobs.get(name)
            if job is not None and job.kind == "quantize" and job.state == "done":
                found.append((label_of(job), f"job:{name}"))
        return found

    def source(self, name: Any) -> Source:
        """The pair of this name; ValueError in plain words if there is none, or none yet."""
        kind, _, rest = str(name or "").partition(":")
        if name == f"shipped:{QUICK}":
            return Source(name, f"the shipped model, {QUICK}", "demo", recipe=QUICK)
        if name == f"shipped:{BEST}":
            if not self.ready:
                raise ValueError(
                    f"{BEST} is still being calibrated in the background; choose {QUICK} until it is ready"
                )
            return Source(name, f"the shipped model, {BEST}", "demo", folder=self.folder / "model")
        job = self.jobs.get(rest) if kind == "job" else None
        if job is None or job.kind != "quantize":
            raise ValueError(f"there is no 4-bit model {str(name)[:60]!r}; choose one from the list")
        if job.state != "done":
            raise ValueError(f"job {rest} has made no model: it is {job.state}")
        return Source(name, label_of(job), job.asked["model"], folder=job.folder / "model")

    def result(self, name: Any) -> dict[str, Any]:
        """What the quantize job behind a name reported: rows, totals, heat."""
        source = self.source(name)
        if source.folder is None:
            from qgen.show.rows import gather

            found = gather(self.pair(source).after)
            return {"rows": list(found), "totals": found.totals, "heat": None}
        return json.loads((source.folder.parent / "job.json").read_text(encoding="utf-8"))["result"]

    def pair(self, source: Source) -> Pair:
        """The pair, loaded now or before. Errors as the loaders raise them."""
        with self._lock:
            if source.name not in self._pairs:
                self._pairs[source.name] = self._load(source)
                self._forget()
            pair = self._pairs.pop(source.name)
            self._pairs[source.name] = pair  # the one used last is forgotten last
            return pair

    def _load(self, source: Source) -> Pair:
        from qgen.engine import quantize
        from qgen.models import adapter_for
        from qgen.nn.packed import Packed
        from qgen.show.rows import gather

        before = self._base(source.base)
        if not callable(before) or not hasattr(before, "components"):
            raise ValueError(f"{source.label} is a bare model, which draws nothing by itself; inspect it instead")
        if source.recipe is not None:
            names = tuple(adapter_for(before).denoisers(before))
            parts = {name: copy.deepcopy(getattr(before, name)) for name in (*names, "scheduler")}
            after = type(before)(**{**before.components, **parts})
            quantize(after, source.recipe, progress=False)
        else:
            after = load(str(source.folder), device=self.device)
            packed = {
                n: m
                for n, m in after.components.items()
                if hasattr(m, "modules") and any(isinstance(x, Packed) for x in m.modules())
            }
            names = tuple(packed)
            after.register_modules(
                **{n: part for n, part in before.components.items() if n not in (*names, "scheduler")}
            )
        _silence(after)
        found = gather(after)
        kernels = tuple(sorted({row["kernel"] for row in found if row["kernel"]}))
        modules = [getattr(pipe, name) for pipe in (before, after) for name in names]
        return Pair(before, after, names, found.totals, kernels, modules)

    def _base(self, name: str) -> Any:
        if name not in self._bases:
            self._bases[name] = load(name, device=self.device)
            _silence(self._bases[name])
        return self._bases[name]

    def _forget(self) -> None:
        others = [name for name in self._pairs if not name.startswith("shipped:")]
        for name in others[: max(0, len(others) - _LOADED)]:
            del self._pairs[name]
        used = {id(pair.before) for pair in self._pairs.values()}
        self._bases = {name: base for name, base in self._bases.items() if name == "demo" or id(base) in used}

    def _prepare(self, job: Job) -> None:
        run_in_child(job, list(self.worker))
        stage = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(stage, ignore_errors=True)
        shutil.copytree(job.folder, stage)
        (stage / "job.json").write_text(json.dumps({**job.facts(), "state": "done"}), encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)
        stage.rename(self.folder)


def label_of(job: Job) -> str:
    """A job's model as a list shows it."""
    model = job.asked["model"]
    return f"{Path(model).name if model != 'demo' else 'Shipped'}, {job.asked['recipe']} (job {job.id[:6]})"


def _silence(pipe: Any) -> None:
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)


def _key() -> str:
    """Changes when the recipe, the calibration or qgen does: an old result is then not used."""
    from qgen import recipes
    from qgen.assets import assets_dir
    from qgen.show.report import version

    weights = sorted(
        (path.name, path.stat().st_size) for path in (assets_dir() / "emoji-pixart").rglob("*.safetensors")
    )
    text = json.dumps([version(), recipes.get(BEST).to_json(), _CALIBRATION, weights])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
