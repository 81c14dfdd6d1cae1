"""Leading rows: how the inputs of all samples begin, where they all begin alike. CLIP's start token is found so, and nothing is assumed.

An encoder that looks both ways (T5, MiniLM) mixes the prompt into its first token: nothing is found then.
"""

__all__ = ["Leading", "some"]

from collections.abc import Sequence

import torch
from torch import Tensor

from qgen.calibration.base import Call
from qgen.nn.known import same


class Leading:
    """The first rows that all samples seen so far have in common, `most` at most; `rows` is (P, K), or None.

    A sample that begins with zeros has no say: pipelines put them for an empty prompt, and they pass any quantizer exactly. At least half
    of the shortest sample is left to differ, so that what never changes at all is not taken for a beginning.
    """

    def __init__(self, most: int = 4):
        self.most = most
        self.first: Tensor | None = None
        self.calls = 0

    def update(self, x: Tensor) -> None:
        """x: (samples, tokens, K) of one call. An input without an axis of samples says nothing of prompts, and ends it."""
        if x.ndim != 3:
            self.first, self.most = None, 0
            return
        asked = [sample for sample in x if bool(sample[0].any())]
        self.calls += bool(asked)
        for sample in asked:
            self.most = min(self.most, len(sample) // 2)
            if self.first is None:
                self.first = sample[: self.most].detach().clone()
                continue
            pairs = zip(self.first[: self.most], sample, strict=False)
            alike = torch.stack([same(b, a) & a.any() for a, b in pairs]) if self.most else torch.zeros(0)
            self.most = int(alike.cumprod(0).sum())

    @property
    def rows(self) -> Tensor | None:
        """(P, K) in the dtype in which they came; None if there are none, or fewer than two calls could be compared."""
        if self.first is None or self.calls < 2 or not self.most:
            return None
        return self.first[: self.most]


def some(calls: Sequence[Call], most: int = 8) -> list[Call]:
    """One call of each of at most `most` samples, each at another step; a quarter of them of those held out, if there are any."""
    made: list[Call] = []
    for held, count in ((False, most - most // 4), (True, most // 4)):
        samples: dict[int, list[Call]] = {}
        for call in calls:
            if call.moment.held == held:
                samples.setdefault(call.moment.sample, []).append(call)
        spread = sorted(samples)[:: max(1, -(-len(samples) // count))]
        made += [samples[name][(len(made) + i) % len(samples[name])] for i, name in enumerate(spread)]
    return made
