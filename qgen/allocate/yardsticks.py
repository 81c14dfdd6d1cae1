"""What a quantized layer, or a whole choice of them, does to outputs: measured against the 16-bit model.

A yardstick remembers the float model's answer when it is made, and compares with it whatever the model has become when it is called.
Those that draw live with the metrics, in `qgen.eval.damage`; the registry finds them there.
"""

__all__ = ["Outputs", "Yardstick", "yardsticks"]

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qgen.calibration.base import CalibrationSet, Call
from qgen.methods.base import sqnr_db
from qgen.registry import Registry


class Yardstick(Protocol):
    """names: of the damages it measures. denoisers: those whose layers it can judge."""

    names: tuple[str, ...]
    denoisers: Collection[str]

    def __call__(self) -> dict[str, float]:
        """Damages of the model as it is now; those of the float model are 0."""
        ...

    def scores(self) -> dict[str, float]:
        """The same in the words of a quality, where more is better: "psnr", "ssim", "sqnr"."""
        ...


yardsticks: Registry[type] = Registry("yardstick", "qgen.eval")


@yardsticks.register("output")
class Outputs:
    """Squared error of one denoiser's output on held-out calls, relative to its energy. at_most: calls, spread over all held-out ones."""

    names = ("output",)

    def __init__(self, name: str, module: nn.Module, calls: CalibrationSet, at_most: int = 6):
        held = [call for call in calls.calls if call.moment.held] or list(calls.calls)
        self.denoisers = (name,)
        self.module = module
        self.calls: list[Call] = held[:: -(-len(held) // at_most)]
        self.wanted = [self._run(call) for call in self.calls]
        self.energy = max(sum(float(w.square().sum()) for w in self.wanted), 1e-30)

    def _run(self, call: Call) -> Tensor:
        with torch.no_grad():
            return first_tensor(call.run(self.module)).float().cpu()

    def __call__(self) -> dict[str, float]:
        lost = sum(float((self._run(c) - w).square().sum()) for c, w in zip(self.calls, self.wanted, strict=True))
        return {"output": lost / self.energy}

    def scores(self) -> dict[str, float]:
        return {"sqnr": sqnr_db(self()["output"])}


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    while not isinstance(output, Tensor):
        output = output[0] if not isinstance(output, dict) else next(iter(output.values()))
    return output
