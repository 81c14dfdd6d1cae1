"""diffusers' `nunchaku_lite`, written: a model folder whose W4A4 and W4A16 layers diffusers runs on CUDA GPUs.

One precision and one rank serve all W4A4 layers of a file: lower ranks are filled up with zeros. Inputs are never shifted and nothing is
padded, so N and K must be multiples of 128. diffusers wants the keys to be exactly the model's, buffers that `state_dict` leaves out among
them, and loads every float in the compute dtype. So the model is built from its config without memory, each tensor is compared with it,
floats are written in that dtype, and the folder appears only if all fits.
"""

__all__ = ["NunchakuLiteExport"]

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgen.io.atomic import staged
from qgen.io.peers import nunchaku_packing as packing
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.floats import write_config
from qgen.io.peers.nunchaku_linear import floats_of
from qgen.io.peers.nunchaku_lite import GROUPS
from qgen.io.peers.nunchaku_model import Skeleton, compute_dtype
from qgen.io.peers.nunchaku_write import (
    Written,
    awq_linear,
    awq_refusal,
    level,
    rank_of,
    svdq_linear,
    svdq_refusal,
    write_awq,
    write_svdq,
)
from qgen.io.peers.writer import SafetensorsWriter

_NAME = "diffusion_pytorch_model.safetensors"


@exporters.register("nunchaku-lite")
class NunchakuLiteExport:
    """The exporter. What the kernels cannot compute is dequantized, one line each."""

    about = "a diffusers model folder with nunchaku_lite layers, for CUDA GPUs of diffusers >= 0.40"

    @staticmethod
    def write(parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        """Writes the folder `target`: weights and config.json. Needs about.config, and diffusers for the model's own list of tensors.

        Raises ValueError if about.config names no model of diffusers, if no W4A4 layer can be kept, or if the parts are not the model's.
        """
        model = Skeleton(about)
        with staged(Path(target)) as folder:
            file = _File(model, parts, folder / f"first-{_NAME}")
            _level(file, folder / _NAME)
            write_config(folder, {"_class_name": model.kind, **about.config}, file.config())
        return file.lines


class _File:
    """One pass over the parts into `path`; low-rank factors have each layer's own rank."""

    def __init__(self, model: Skeleton, parts: Iterable[Layer | Plain], path: Path):
        self.model, self.path = model, path
        self.dtype: torch.dtype | None = None
        self.lines: list[str] = []
        self.targets: dict[str, list[str]] = {"svdq_w4a4": [], "awq_w4a16": []}
        self.precision = ""
        self.ranks: dict[str, int] = {}
        self.names: set[str] = set()  # of the float model's tensors that the parts have been
        self.refused: dict[str, int] = {}  # W4A4 layers that could not be kept, by reason
        self.rounded: dict[str, int] = {}
        with SafetensorsWriter(path, {"format": "pt"}) as writer:
            for part in parts:
                self.dtype = self.dtype or compute_dtype(part)
                for name, tensor in self._tensors(part):
                    self._compare(name, tensor, part)
                    writer.add(name, tensor)
            self._finish(writer)

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        made: dict[str, Any] = {"quant_method": "nunchaku_lite", "compute_dtype": str(self.dtype)[6:]}
        for op, targets in self.targets.items():
            precision = self.precision if op == "svdq_w4a4" else "int4"
            if targets:
                made[op] = {"precision": precision, "group_size": GROUPS[precision], "targets": targets}
        if self.ranks:
            made["svdq_w4a4"]["rank"] = max(self.ranks.values())
        return made

    def _tensors(self, part: Layer | Plain) -> Iterator[tuple[str, Tensor]]:
        if isinstance(part, Plain):
            yield part.name, part.tensor.to(self.dtype) if part.tensor.is_floating_point() else part.tensor
            return
        part, lines = self.model.biased(part)
        self.lines += lines
        why = svdq_refusal(part) or self._misfit(part)
        if why is None:
            yield from self._svdq(part)
        elif awq_refusal(part) is None and part.path in self.model.linears:
            self.targets["awq_w4a16"].append(part.path)
            yield from self._named(part.path, write_awq(awq_linear(part), self.dtype))
        else:
            if part.layout.act:
                self.refused[why] = self.refused.get(why, 0) + 1
            why = why if part.layout.act else awq_refusal(part) or why
            self.lines.append(f"{part.path}: dequantized: {why}")
            for plain in floats_of(part, why):
                yield plain.name, plain.tensor.to(self.dtype)

    def _misfit(self, part: Layer) -> str | None:
        n, k = part.shape
        if n % packing.ROWS or k % packing.ROWS:
            return f"{n} x {k}: N and K must be multiples of {packing.ROWS}"
        if part.path not in self.model.linears:
            return f"{self.model.kind} has no linear layer there"
        precision = "nvfp4" if part.layout.act == "nvfp4_dynamic" else "int4"
        self.precision = self.precision or precision
        return (
            None
            if precision == self.precision
            else f"{precision} beside layers of {self.precision}: a file has one precision"
        )

    def _svdq(self, part: Layer) -> Iterator[tuple[str, Tensor]]:
        linear = svdq_linear(part)
        self.ranks[part.path] = rank_of(linear)
        self.targets["svdq_w4a4"].append(part.path)
        yield from self._named(part.path, write_svdq(linear, self.ranks[part.path], self.dtype))

    def _named(self, path: str, written: Written) -> Iterator[tuple[str, Tensor]]:
        for tail in written.rounded:
            self.rounded[tail] = self.rounded.get(tail, 0) + 1
        for tail, tensor in written.tensors.items():
            yield f"{path}.{tail}", tensor

    def _compare(self, name: str, tensor: Tensor, part: Layer | Plain) -> None:
        """ValueError if the model has no such tensor. Those of a kept layer stand for its weight and bias."""
        path = part.path if isinstance(part, Layer) else ""
        if path and path in (*self.targets["svdq_w4a4"][-1:], *self.targets["awq_w4a16"][-1:]):
            self.names |= {f"{path}.weight", f"{path}.bias"}
            self.model.check(f"{path}.weight", part.shape)
        else:
            self.names.add(name)
            self.model.check(name, tuple(tensor.shape))

    def _finish(self, writer: SafetensorsWriter) -> None:
        """What only the whole can show: nothing kept, tensors missing. Then the buffers that no state dict holds."""
        if not self.targets["svdq_w4a4"] and (self.refused or not self.targets["awq_w4a16"]):
            found = (
                "; ".join(f"{count} layers are {why}" for why, count in sorted(self.refused.items()))
                or "nothing is quantized"
            )
            raise ValueError(
                f"nunchaku-lite holds int4_g64 x int4_g64 and nvfp4 x nvfp4_dynamic in multiples of {packing.ROWS}, and {found}. "
                'Quantize with the recipe "nunchaku-int4" or "nunchaku-nvfp4"'
            )
        self.model.check_all(self.names)
        for name, tensor in self.model.unsaved.items():
            if name not in self.names:
                writer.add(name, tensor)
        for tail, count in sorted(self.rounded.items()):
            self.lines.append(
                f"{tail} of {count} layers: rounded to {str(self.dtype)[6:]}, which the kernels compute in"
            )


def _level(file: _File, path: Path) -> None:
    """The file with one rank for all layers: as it is, or copied with zeros added."""
    short = {
        f"{layer}.{tail}": tail
        for layer, rank in file.ranks.items()
        if rank < max(file.ranks.values())
        for tail in ("proj_down", "proj_up")
    }
    level(file.path, path, short, max(file.ranks.values(), default=0), {"format": "pt"})
