"""What diffusers' model of a config holds, without its memory: an exporter compares with it before a file appears."""

__all__ = ["Skeleton", "compute_dtype"]

from dataclasses import replace

import torch
from torch import nn

from qgen.errors import QgenError
from qgen.io.peers.base import Layer, Model, Plain
from qgen.io.skeleton import without_memory


class Skeleton:
    """Of a model of diffusers: kind, its class; linears, paths; shapes of parameters and buffers; unsaved, buffers that no state dict has.

    Raises ValueError if the config is of no model of diffusers, QgenError without diffusers.
    """

    def __init__(self, about: Model):
        try:
            import diffusers
        except ImportError:
            raise QgenError(
                "Nunchaku's files are for models of diffusers: pip install diffusers to write one"
            ) from None
        self.kind = str(about.config.get("_class_name") or about.kind)
        cls = getattr(diffusers, self.kind, None)
        if not about.config or not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
            raise ValueError(f"Nunchaku's files want the config of a model of diffusers, found {self.kind or 'none'}")
        self.config = {
            name: v for name, v in about.config.items() if name not in ("quantization_config", "_name_or_path")
        }
        with without_memory():
            model = cls.from_config(self.config)
        self.linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.shapes = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
        saved = model.state_dict().keys()
        self.unsaved = {name: t for name, t in model.named_buffers() if name not in saved}

    def biased(self, part: Layer) -> tuple[Layer, list[str]]:
        """The layer with a bias exactly if the model has one there, and a line if that changes what it computes."""
        wanted = f"{part.path}.bias" in self.shapes
        if wanted == ("bias" in part.slots):
            return part, []
        if wanted:
            return replace(part, slots={**part.slots, "bias": torch.zeros(part.shape[0], dtype=part.dtype)}), []
        slots = {name: t for name, t in part.slots.items() if name not in ("bias", "shift")}
        return replace(part, slots=slots), [
            f"{part.path}: the bias that quantizing added is left out: the model has none there"
        ]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ValueError unless the model has a tensor `name` of `shape`."""
        wanted = self.shapes.get(name)
        if wanted != tuple(shape):
            found = "has no such tensor" if wanted is None else f"has it as {wanted}"
            raise ValueError(f"{name!r} of {tuple(shape)} is not the model's: {self.kind} {found}")

    def check_all(self, names: set[str]) -> None:
        """ValueError if a tensor that files must hold is not among `names`."""
        for name in sorted(self.shapes.keys() - self.unsaved.keys() - names):
            raise ValueError(f"{self.kind} of this config wants {name!r}, which the parts lack")


def compute_dtype(part: Layer | Plain) -> torch.dtype | None:
    """float16 if a part is, else bfloat16: the kernels compute in no other. None if the part does not tell."""
    found = part.dtype if isinstance(part, Layer) else part.tensor.dtype
    if not found.is_floating_point:
        return None
    return torch.float16 if found == torch.float16 else torch.bfloat16
