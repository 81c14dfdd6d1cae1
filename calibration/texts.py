"""Texts: a language model's calibration calls, windows of tokens cut from documents.

    qgen.quantize(model, "gptq-w4a16", calibration=Texts(tokenizer, documents))

A window is a sample: what is held out from fitting is whole windows. Long documents give several windows, taken in turn over the documents
so that the first one does not fill the set alone; windows of one token say nothing and are left out.
"""

__all__ = ["Texts"]

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call, Moment, calibrators


@calibrators.register("texts")
@dataclass(frozen=True)
class Texts:
    """Windows of at most `length` tokens, at most `samples` of them.

    tokenizer: `tokenizer(text)["input_ids"]` gives a list of ids. documents: texts. held: share of windows held out.
    """

    tokenizer: Any
    documents: Sequence[str]
    length: int = 512
    samples: int = 128
    held: float = 0.2

    def windows(self) -> list[Tensor]:
        """Token ids, each (1, up to length) int64. ValueError if no document has two tokens."""
        if isinstance(self.documents, str) or self.length < 2 or self.samples < 1:
            raise ValueError(
                f"texts are a list of documents, cut into windows of two tokens or more: found {type(self.documents).__name__}, "
                f"length {self.length}, samples {self.samples}"
            )
        cut = []
        for text in self.documents:
            ids = torch.as_tensor(self.tokenizer(text)["input_ids"], dtype=torch.long).reshape(1, -1)
            cut.append([part for part in ids.split(self.length, 1) if part.shape[1] > 1])
        found = [part for turn in zip_longest(*cut) for part in turn if part is not None]
        if not found:
            raise ValueError(f"at least one text of two tokens wanted, found {len(self.documents)} texts without")
        return found[: self.samples]

    def calls(
        self,
        pipe: Any,
        denoisers: dict[str, nn.Module],
        prompts: Sequence[str] | None = None,
        call_kwargs: dict | None = None,
        seed: int = 0,
        progress: Callable = lambda items, **_: items,
    ) -> dict[str, CalibrationSet]:
        """The same calls for each module; a model that keeps a cache is told not to. Prompts, seed and progress say nothing here."""
        windows, made = self.windows(), {}
        for name, module in denoisers.items():
            options = dict(call_kwargs or {})
            if "use_cache" in inspect.signature(module.forward).parameters:
                options.setdefault("use_cache", False)
            calls = tuple(Call((), {"input_ids": ids, **options}, Moment(i)) for i, ids in enumerate(windows))
            made[name] = CalibrationSet(calls, f"{len(windows)} windows of text").hold_out(self.held)
        return made
