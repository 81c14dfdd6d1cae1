"""Student: a quantized denoiser whose packed layers have twins. It is called as before; what the twins hold can be trained."""

__all__ = ["Student"]

from collections.abc import Iterator

from torch import Tensor, nn

from qgen.nn.kinds import kind_of
from qgen.nn.packed import Packed
from qgen.train.twin import Twin
from qgen.train.zeroth import Probe


class Student:
    """A quantized denoiser whose packed layers have twins, from `wear()` to `close()`."""

    def __init__(self, module: nn.Module, teacher: nn.Module | None = None):
        originals = dict(teacher.named_modules()) if teacher is not None else {}
        self.module, self.probe = module, Probe()
        self.stages: dict[str, int] = {}  # of methods that train layers in turn: when, by path
        self.twins = {
            path: Twin(path, layer, _float_layer(originals.get(path)), self.probe)
            for path, layer in module.named_modules()
            if isinstance(layer, Packed)
        }

    def wear(self) -> None:
        """Twins with leaves answer in their layers' place; the others leave the packed layer to itself."""
        for twin in self.twins.values():
            twin.wear()

    def close(self) -> None:
        """The denoiser is as it was."""
        for twin in self.twins.values():
            twin.release()

    def leaves(self) -> dict[str, Tensor]:
        """All leaves by "path:name"."""
        return {f"{path}:{name}": t for path, name, t in self._each()}

    def rates(self) -> dict[str, float]:
        """Optimizer's step for each leaf."""
        return {f"{path}:{name}": self.twins[path].rates[name] for path, name, _ in self._each()}

    def packed(self) -> dict[str, dict[str, Tensor]]:
        """Canonical slots by path, of layers with leaves."""
        return {path: twin.packed() for path, twin in self.twins.items() if twin.leaves}

    def _each(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, twin in self.twins.items():
            for name, leaf in twin.leaves.items():
                yield path, name, leaf


def _float_layer(layer: nn.Module | None) -> nn.Module | None:
    return layer if layer is not None and kind_of(layer) and not isinstance(layer, Packed) else None
