"""From what metrics measured to the rows of a table.

Values per prompt become a mean with its bootstrap interval; where the reference's pictures were judged too, the mean
*paired* difference with its interval stands beside it. A Fréchet distance over too few pictures is flagged, and the
kernel distance over the same network, which is unbiased at any number, is put before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qgen.eval.bootstrap import bootstrap_difference, bootstrap_mean
from qgen.eval.metrics import Measured
from qgen.eval.scores import Score, Scores

__all__ = ["collect"]


def collect(
    measured: Mapping[str, Measured],
    n: int,
    prompts: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Scores:
    """Returns `Scores` with one row per entry of `measured`, in order. n: samples; seed: of the bootstrap's draws."""
    rows = tuple(_row(name, found, n, seed) for name, found in measured.items())
    both = {name: found for name, found in measured.items() if found.per_prompt is not None}
    per_prompt = {name: tuple(found.per_prompt.tolist()) for name, found in both.items()}
    return Scores(rows, per_prompt, tuple(prompts), dict(settings or {}))


def measure(registry: Any, names: Sequence[str], subject: Any) -> dict[str, Measured]:
    """Every metric's finding by name. Where "fid" is flagged and "kid" was not asked for, "kid" is added before it."""
    found: dict[str, Measured] = {}
    for name in names:
        one = registry[name](subject)
        if name == "fid" and one.flagged and "kid" not in names:
            found |= _kernel_instead(registry["kid"], subject, one)
        found[name] = one
    return found


def _kernel_instead(kid: Callable[[Any], Measured], shots: Any, fid: Measured) -> dict[str, Measured]:
    import dataclasses

    mine, theirs, _ = shots.feature_pair(fid.extractor, "fid")
    if min(len(mine), len(theirs)) < 3:
        return {}  # no kernel distance either; the flag says enough
    # The same network, already loaded, so that both rows are about the same features.
    twin = dataclasses.replace(shots, extractor={"kid": fid.extractor})
    return {"kid": kid(twin)}


def _row(name: str, found: Measured, n: int, seed: int) -> Score:
    value, low, high, reference = found.value, found.low, found.high, found.reference_value
    change = found.change
    if change is not None and reference is None:
        reference = value - change.mean
    if found.per_prompt is not None:
        mean = bootstrap_mean(found.per_prompt, seed=seed)
        value, low, high, n = mean.mean, mean.low, mean.high, mean.n
        if found.reference_per_prompt is not None:
            reference = float(found.reference_per_prompt.double().mean())
            change = bootstrap_difference(found.per_prompt, found.reference_per_prompt, seed=seed)
    difference = None if reference is None else value - reference
    if found.reference_per_prompt is not None:
        difference = change.mean  # of pairs; the difference of two infinite means is none
    network = found.extractor
    return Score(
        metric=name,
        label=found.label,
        value=value,
        low=low,
        high=high,
        n=n,
        unit=found.unit,
        better=found.better,
        extractor=network.name if network is not None else None,
        digest=network.digest if network is not None else None,
        note=found.note,
        reference=reference,
        difference=difference,
        difference_low=change.low if change else None,
        difference_high=change.high if change else None,
        flagged=found.flagged,
    )
