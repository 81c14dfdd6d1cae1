"""Features: what chosen modules of the student give in a step, with their graph, and what the teacher's modules of these names give.

A term that compares them is added to the distance of the outputs. The teacher runs once more for each call of a step; nothing is kept.
"""

__all__ = ["Added", "Features"]

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qgen.train.cases import floats
from qgen.train.distill import Lessons


class Added(Protocol):
    """What a method adds to the loss, from the beginning of a run to its `close`."""

    def loss(self, number: int, done: float) -> Tensor:
        """() to add for the call that the student answered last, at a share `done` of the steps."""
        ...

    def close(self) -> None:
        """Leaves the models as they were."""
        ...


class Features:
    """paths: of modules that student and teacher have. ValueError without a teacher, or if it has no such module."""

    def __init__(self, module: nn.Module, lessons: Lessons, paths: Iterable[str]):
        if lessons.teacher is None:
            raise ValueError(
                "a loss inside the model needs what the teacher's layers answer: pass the teacher, or leave that loss out"
            )
        self.module, self.lessons, self.paths = module, lessons, list(paths)
        modules = dict(lessons.teacher.named_modules())
        if missing := [path for path in self.paths if path not in modules]:
            raise ValueError(f"the teacher has no module {missing[0]!r}, which the student is to learn from")
        self._got: dict[str, tuple[Tensor, ...]] = {}
        self._hooks = _watch(module, self.paths, self._got)

    def take(self) -> dict[str, tuple[Tensor, ...]]:
        """Float tensors that each module gave when the student last answered, those that did not run left out."""
        made = dict(self._got)
        self._got.clear()
        return made

    @torch.no_grad()
    def want(self, number: int) -> dict[str, tuple[Tensor, ...]]:
        """The teacher's, on a call."""
        made: dict[str, tuple[Tensor, ...]] = {}
        hooks = _watch(self.lessons.teacher, self.paths, made)
        try:
            self.lessons.calls[number].run(self.lessons.teacher)
        finally:
            for handle in hooks:
                handle.remove()
        return made

    def close(self) -> None:
        """Watches no more."""
        for handle in self._hooks:
            handle.remove()
        self._got.clear()


def _watch(module: nn.Module, paths: Iterable[str], into: dict) -> list:
    def noting(path: str) -> Callable:
        def hook(part: nn.Module, args: tuple, output: Any) -> None:
            into[path] = floats(output)

        return hook

    return [module.get_submodule(path).register_forward_hook(noting(path)) for path in paths]
