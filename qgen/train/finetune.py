"""Behind `qgen.finetune`: pipeline and teacher → calls → one run per denoiser → the best held-out state packed in place.

Nothing is changed before every run is through: whatever goes wrong in between (Ctrl-C, a full disk, an error in a model) leaves the
pipeline as it was. A loss that is no number ends the run with the best state so far, which is the one before if none was better.
"""

__all__ = ["finetune"]

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Moment
from qgen.calibration.recorder import Recorder, as_calls
from qgen.checks import check_weights
from qgen.errors import NotQuantizable
from qgen.methods.base import sqnr_db
from qgen.models import adapter_for
from qgen.nn.packed import Packed
from qgen.progress import bars
from qgen.train.base import Tuning, tunings
from qgen.train.distill import Lessons
from qgen.train.loop import Plan
from qgen.train.progress import Progress
from qgen.train.student import Student

log = logging.getLogger("qgen")


def finetune(
    pipe: Any,
    teacher: Any = None,
    method: str | Tuning = "efficientdm",
    *,
    steps: int = 200,
    lr: float | None = None,
    batch: int = 1,
    prompts: Sequence[str] | None = None,
    call_kwargs: dict | None = None,
    calibration: Any = None,
    weight: Callable[[Moment], float] | None = None,
    every: int | None = None,
    checkpoint: str | Path | None = None,
    precision: str = "no",
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Fine-tunes a quantized pipeline, or module, in place so that its denoisers answer as the 16-bit teacher's do; returns its argument.

    Arguments:
        pipe: quantized by `qgen.quantize`, or loaded. It ends with the same slots in every layer, and nothing beside them.
        teacher: the 16-bit pipeline or module; None where `calibration` holds the teacher's answers (`Call.output`).
        method: a name of `qgen.train.tunings`, or one of its dataclasses with fields set.
        steps: of the optimizer, each on `batch` recorded calls (a call holds several prompts, see `Recorder.batch`); of brecq and qdrop,
            for each block.
        lr: takes the place of the method's `rate`.
        prompts, call_kwargs: what the teacher draws to be learned from, as for `qgen.quantize`.
        calibration: recorded calls of the *teacher* (`qgen.calibration.record(teacher)`), or a calibrator. A fifth is held out by prompt.
        weight: factor on a call's loss, by its Moment.
        every: steps between looks at the held-out calls; default: a tenth of `steps`. The best state seen is the one that is kept.
        checkpoint: folder for progress; the same call goes on from there after a crash, with the same numbers.
        precision: "no" or "bf16": of the float parts of the model, by accelerate. Packed layers always compute in float32 here.
        seed: of the teacher's noise and of methods' random numbers.

    What happened is in `qgen_tuning` of each denoiser: method, loss of every step, held-out errors by step, those of each held-out call
    before and after, and the step whose state was kept (0 = none was better than the start); for brecq and qdrop also, by block, its
    held-out error before and after, and whether its new codes were kept.

    Raises NotQuantizable (nothing in it is quantized, or the teacher is), ValueError (unknown names, no calls), BadData, BadCheckpoint. In
    each case, and when interrupted, nothing is changed.
    """
    chosen = tunings[method]() if isinstance(method, str) else method
    chosen = chosen if lr is None else replace(chosen, rate=lr)
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch are at least 1, found steps={steps}, batch={batch}")
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision is 'no' or 'bf16', found {precision!r}")
    plan = Plan(steps, batch, every or max(1, steps // 10), seed, precision)
    denoisers = {name: module for name, module in adapter_for(pipe).denoisers(pipe).items() if _packed(module)}
    teachers = {} if teacher is None else adapter_for(teacher).denoisers(teacher)
    _check(pipe, denoisers, teachers)
    bar = bars(progress)
    sets = _calls(teacher, teachers, denoisers, calibration, prompts, call_kwargs, seed, bar)
    found: dict[str, Progress] = {}
    with _at_rest([*denoisers.values(), *teachers.values()]):
        for name, module in denoisers.items():
            label = name or type(module).__name__
            original = teachers.get(
                name, next(iter(teachers.values())) if len(teachers) == len(denoisers) == 1 else None
            )
            lessons = Lessons(sets[name], original, weight)
            path = Path(checkpoint) / f"tuning-{name or 'module'}.safetensors" if checkpoint else None
            job = {"model": _digest(module), "calls": lessons.digest()} if path else {}
            student = Student(module, original)
            try:
                found[name] = chosen.teach(student, lessons, plan, label, bar, path, job)
            finally:
                student.close()
        for name, made in found.items():
            _install(denoisers[name], made.packed)
            _tell(name, denoisers[name], chosen, made)
    return pipe


def _check(pipe: Any, denoisers: dict[str, nn.Module], teachers: dict[str, nn.Module]) -> None:
    if not denoisers:
        raise NotQuantizable(f"{type(pipe).__name__} has no quantized layer to fine-tune: call qgen.quantize first")
    for name, module in teachers.items():
        if _packed(module):
            raise NotQuantizable(f"the teacher's {name or type(module).__name__} is quantized; load the 16-bit model")
        check_weights(module, name)
    for name, module in denoisers.items():
        fused = [path for path, layer in _packed(module).items() if layer.fused_from is not None]
        if fused:
            raise ValueError(
                f"{name or type(module).__name__}: a LoRA is fused into layer {fused[0]}, which the teacher does not know: call "
                "qgen.unfuse_lora(pipe) first"
            )


def _calls(
    teacher: Any,
    teachers: dict[str, nn.Module],
    denoisers: dict[str, nn.Module],
    calibration: Any,
    prompts: Sequence[str] | None,
    call_kwargs: dict | None,
    seed: int,
    bar: Callable,
) -> dict[str, CalibrationSet]:
    """The teacher's calls for each quantized denoiser."""
    if calibration is None or callable(getattr(calibration, "calls", None)):
        if teacher is None:
            raise ValueError(
                "without a teacher there is nothing to learn from: pass the 16-bit pipeline, or calls with its answers"
            )
        recorder = calibration or Recorder()
        sets = recorder.calls(teacher, teachers, prompts=prompts, call_kwargs=call_kwargs, seed=seed, progress=bar)
    elif isinstance(calibration, dict) and set(calibration) <= {*denoisers, *teachers}:
        sets = {name: as_calls(given) for name, given in calibration.items()}
    else:
        sets = dict.fromkeys(denoisers, as_calls(calibration))
    if len(sets) == len(denoisers) == 1:
        sets = dict(zip(denoisers, sets.values(), strict=True))  # a pipeline's module may be taught on its own
    for name in denoisers:
        if name not in sets:
            raise ValueError(f"no recorded call of the denoiser {name!r}: record calls of it, or quantize it alone")
        sets[name] = sets[name].hold_out()
        sets[name].check()
    return sets


@contextlib.contextmanager
def _at_rest(modules: list[nn.Module]) -> Iterator[None]:
    """Dropout off, no gradients for any parameter of the models; both are put back."""
    modes = {layer: layer.training for module in modules for layer in module.modules()}
    asked = {p: p.requires_grad for module in modules for p in module.parameters() if p.requires_grad}
    try:
        for layer in modes:
            layer.training = False
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode
        for p in asked:
            p.requires_grad_(True)


def _install(module: nn.Module, packed: dict[str, dict[str, Tensor]]) -> None:
    for path, slots in packed.items():
        layer: Any = module.get_submodule(path)
        kernel, device = layer.kernel, layer.codes.device
        layer.fill({name: t.to(device) for name, t in slots.items()})
        if kernel is not None:
            layer.prepare(kernel)


def _tell(name: str, module: nn.Module, method: Tuning, made: Progress) -> None:
    """Leaves the record on the denoiser, and what the whole of it now loses in its report."""
    error = made.held[made.best]
    record = {key: getattr(made, key) for key in ("curve", "held", "best", "before", "after")}
    record |= {"blocks": made.blocks} if made.blocks else {}
    module.__dict__["qgen_tuning"] = {"method": method.name, **record}
    log.info("%s: %s, held-out error %.4g -> %.4g", name, method.name, made.held[0], error)
    report = module.__dict__.get("qgen_report")
    if made.best and isinstance(report, list) and type(method).distance is Tuning.distance:  # an error in dB
        why = f"whole denoiser, held-out calls, fine-tuned ({method.name}, {made.best} steps)"
        row = {"path": "(output)", "kind": "denoiser", "why": why, "sqnr_db": sqnr_db(error)}
        module.__dict__["qgen_report"] = [*(r for r in report if r.get("path") != "(output)"), row]


def _packed(module: nn.Module) -> dict[str, Packed]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Packed)}


def _digest(module: nn.Module) -> str:
    """sha256 of every tensor of the module, packed layers by their canonical bytes."""
    h = hashlib.sha256()
    layers = _packed(module)
    packed = [(f"{path}:{slot}", t) for path, layer in layers.items() for slot, t in layer.canonical().items()]
    rest = [(n, t) for n, t in module.named_parameters() if n.rpartition(".")[0] not in layers]
    for name, t in (*packed, *rest, *module.named_buffers()):
        h.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        h.update(t.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
