"""What a metric is: a function from `Shots` to `Measured`, registered under the name that `evaluate(metrics=…)` uses.

A new metric is one file in this folder with one decorated function. `Shots` holds the pictures of one comparison and
hands out networks and features, each computed once however many metrics ask for it. `@needs("reference", "network")`
says what a metric cannot do without, so that its lack is an error before hours of drawing and not after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.eval.bootstrap import Interval
from qgen.eval.extractors import Choice, find_extractor, load_features
from qgen.eval.images import batches, load_folder
from qgen.registry import Registry

__all__ = ["Measured", "Shots", "metrics", "needs", "same_shape"]


@dataclass(frozen=True)
class Measured:
    """What one metric found: a value per prompt, or one value for the whole set with its interval if it has one.

    Metrics that judge each picture by itself also say what the reference's pictures get, in reference_per_prompt (or
    reference_value): the paired difference is then computed from both. change: the difference from the reference, of
    metrics that find it in another way. flagged: too few samples to be trusted.
    """

    label: str
    unit: str
    better: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    per_prompt: Tensor | None = None
    extractor: Any = None
    note: str = ""
    reference_value: float | None = None
    reference_per_prompt: Tensor | None = None
    change: Interval | None = None
    flagged: bool = False


@dataclass
class Shots:
    """Pictures to score, and what they are compared with.

    pictures and reference are (n, H, W, 3) float32 in [0, 1], of the same prompts and noise; real is a folder of
    pictures, a features file, or pictures of any number. extractor is "auto", "small", "real", a name, a name with a
    path, or one of these per metric.
    """

    pictures: Tensor
    reference: Tensor | None = None
    prompts: Sequence[str] | None = None
    real: Any = None
    extractor: Any = "auto"
    batch_size: int = 16
    device: str = "cpu"
    _loaded: dict[Any, Any] = field(default_factory=dict, repr=False)

    def need_reference(self, metric: str) -> Tensor:
        """The reference pictures; ValueError if there are none."""
        if self.reference is None:
            raise ValueError(
                f"{metric} compares with the pictures of another pipeline: pass reference= (the 16-bit pipeline or its "
                f"pictures), or leave {metric!r} out of metrics="
            )
        return self.reference

    def need_prompts(self, metric: str) -> Sequence[str]:
        """The prompts; ValueError if there are none."""
        if self.prompts is None:
            raise ValueError(
                f"{metric} compares pictures with words: pass prompts=, or leave {metric!r} out of metrics="
            )
        return self.prompts

    def need_set(self, metric: str) -> None:
        """ValueError unless there is a set of pictures to compare with."""
        if self.real is None and self.reference is None:
            raise ValueError(
                f"{metric} compares with a set of pictures: pass reference= (the 16-bit pipeline or its pictures) or "
                f"real= (a folder of pictures or a features file), or leave {metric!r} out of metrics="
            )

    def choose(self, metric: str) -> Any:
        """The network that serves a metric, not loaded yet; errors as `find_extractor`."""
        wanted = self.extractor
        if isinstance(wanted, Mapping):
            wanted = wanted.get(metric, "auto")
        return find_extractor(metric, wanted)

    def extractor_for(self, metric: str) -> Any:
        """The network that serves a metric, loaded once."""
        choice = self.choose(metric)
        if not isinstance(choice, Choice):
            return choice
        if choice not in self._loaded:
            self._loaded[choice] = choice.load(self.device)
        return self._loaded[choice]

    def on_both(self, judge: Callable[[Tensor], Any]) -> tuple[Any, Any]:
        """judge(pictures), and judge(the reference's pictures) or None without a reference."""
        return judge(self.pictures), None if self.reference is None else judge(self.reference)

    def feature_pair(self, extractor: Any, metric: str) -> tuple[Tensor, Tensor, str]:
        """Features of the pictures (n, K), of what they are compared with (m, K), and words that say what that was."""
        self.need_set(metric)
        mine = self.features_of("pictures", extractor)
        if self.real is not None:
            return mine, self.features_of("real", extractor), "against real pictures"
        return mine, self.features_of("reference", extractor), "against the reference's pictures"

    def features_of(self, which: str, extractor: Any) -> Tensor:
        """Features (n, K) of "pictures", "reference" or "real", computed once."""
        key = (which, id(extractor))
        if key not in self._loaded:
            self._loaded[key] = self._compute(getattr(self, which), extractor)
        return self._loaded[key]

    def _compute(self, pictures: Any, extractor: Any) -> Tensor:
        if isinstance(pictures, (str, Path)):
            if Path(pictures).suffix == ".safetensors":
                return load_features(pictures, extractor)
            pictures = load_folder(pictures)
        return torch.cat([extractor.features(x).float().cpu() for x in batches(pictures, self.batch_size)])


metrics: Registry[Callable[[Shots], Measured]] = Registry("metric", "qgen.eval")


def needs(*what: str) -> Callable[[Any], Any]:
    """Decorator: this metric needs "reference", "prompts", "set" (a reference or real pictures) or "network"."""

    def mark(function: Any) -> Any:
        function.needs = what
        return function

    return mark


def check_early(names: Sequence[str], shots: Shots) -> None:
    """Asks every question that needs no picture: drawing takes long, and a late error is a waste."""
    ask = {
        "reference": shots.need_reference,
        "prompts": shots.need_prompts,
        "set": shots.need_set,
        "network": shots.choose,
    }
    for name in names:
        for what in getattr(metrics[name], "needs", ()):
            ask[what](name)


def same_shape(pictures: Tensor, reference: Tensor) -> None:
    """Raises ValueError unless both are (n, H, W, 3) alike, with a line that says what differs."""
    for what, x in (("pictures", pictures), ("reference", reference)):
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"{what} must have shape (n, height, width, 3), found {tuple(x.shape)}")
    if len(pictures) != len(reference):
        raise ValueError(f"{len(pictures)} pictures cannot be compared with {len(reference)} of the reference")
    if pictures.shape != reference.shape:
        found, wanted = (f"{x.shape[1]} x {x.shape[2]}" for x in (pictures, reference))
        raise ValueError(f"pictures are {found} and the reference's {wanted}; draw both at one size")
