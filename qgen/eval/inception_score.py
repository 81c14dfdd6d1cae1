r"""Inception Score: pictures that each show one clear class, and together many, score high.

    is = exp( mean_i Σ_c p_ic log(p_ic / q_c) ),     p_i = softmax(class scores of picture i),   q = mean_i p_i

It looks at one set alone, so it says nothing about likeness to the 16-bit pictures; the reference's own value stands
beside it. All pictures form one group (papers cut 50,000 into ten). It grows with n: compare equal n. The interval is
±1.96 standard errors by the jackknife. Over another network than InceptionV3 it carries that network's name.

Salimans et al., 2016, https://arxiv.org/abs/1606.03498; Barratt & Sharma, 2018, https://arxiv.org/abs/1801.01973
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgen.eval.bootstrap import Interval
from qgen.eval.images import batches
from qgen.eval.metrics import Measured, Shots, metrics, needs

__all__ = ["inception_score"]

FEW = 5000  # a group of the papers' ten


def inception_score(logits: Tensor) -> Interval:
    """Returns the score of class scores (n, C), computed in float64, with its 95 % interval; 1 is the least, C the most.

    Raises ValueError for fewer than two rows.
    """
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(f"class scores (n >= 2, C) wanted, found {tuple(logits.shape)}")
    log_p = logits.double().log_softmax(1)
    p, n = log_p.exp(), len(logits)
    own = (p * log_p).sum(1)  # (n,) Σ p log p of each picture
    total, q = own.sum(), p.sum(0)
    value = (total / n - _entropic(q / n)).exp()
    # Leave one picture out: both sums lose one term.
    without = ((total - own) / (n - 1) - _entropic((q - p).clamp_min(0) / (n - 1))).exp()
    half = 1.96 * float((n - 1) * without.var(correction=0)) ** 0.5
    return Interval(float(value), float(value) - half, float(value) + half, n)


@metrics.register("is")
@needs("network")
def score_is(shots: Shots) -> Measured:
    extractor = shots.extractor_for("is")

    def judge(pictures: Tensor) -> Interval:
        return inception_score(torch.cat([extractor.logits(x).cpu() for x in batches(pictures, shots.batch_size)]))

    mine, theirs = shots.on_both(judge)
    note = f"one group of {mine.n}; grows with n, compare equal n only" if mine.n < FEW else ""
    return Measured(
        extractor.labels["is"],
        "",
        "higher",
        mine.mean,
        mine.low,
        mine.high,
        extractor=extractor,
        note=note,
        reference_value=theirs.mean if theirs else None,
    )


def _entropic(q: Tensor) -> Tensor:
    """Σ q log q over the last axis, 0 log 0 = 0."""
    return torch.special.xlogy(q, q).sum(-1)
