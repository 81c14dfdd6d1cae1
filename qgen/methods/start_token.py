r"""The start token apart: rows of text that are the same for every prompt keep the float layer's output, see `qgen.nn.known`.

    y_bos = x_bos Wᵀ + b   once, in floats;      scales, moments and roundings are those of the other rows alone

CLIP's start token is prompt independent and some thirty times as large as the rest: under one static scale the other 76 tokens share what
levels it leaves. Whether a model has such rows is found out, not assumed: of some prompts, held-out ones among them, the first rows are
compared (`qgen.calibration.leading`). Where they differ, as with T5, this method does nothing.
Zhao et al., 2024, MixDQ, https://arxiv.org/abs/2405.17873
"""

__all__ = ["StartToken"]

from dataclasses import dataclass, replace
from typing import ClassVar

from qgen.methods.base import Stats
from qgen.recipe import methods
from qgen.site import Draft, Site


@methods.register("start-token")
@dataclass(frozen=True)
class StartToken:
    """Stores the constant first rows of the input with their float outputs. Stands first. Linear layers alone.

    Cannot raise the error of any row: a known row has none left, and the others are quantized by themselves. Asking for it is what
    keeps those rows out of all statistics: where several layers read one input, all of them must ask.
    """

    name: ClassVar[str] = "start-token"

    def needs(self, site: Site) -> frozenset[str]:
        return frozenset({"rows", "known"} if site.kind == "linear" else ())

    def refine(self, draft: Draft, stats: Stats) -> Draft:
        if stats.known is None:
            return draft
        return replace(draft, known=stats.known.float()).noted(known_rows=len(stats.known))
