r"""Nunchaku's own single file, written: fused layers, interleaved adaLN rows, shifted inputs after GELU, as its runners want them.

Its runners build their blocks themselves, so it is all or nothing: each of their layers must be there, W4A4 in one precision or W4A16.
Layers that it fuses must share smoothing and low rank (`Spec(share=True)`). What its kernels do by themselves is not the recipe's to say:
after GELU INT4 inputs are shifted and rounded to 0..15, so a layer that rounds them signed gets the constant into its bias:

    b − Ŵ (0.171875 / smooth)        with Q(x + 0.171875) for Q(x)

Layers that its runners keep in 16 bits are dequantized, one line each.
"""

__all__ = ["NunchakuExport"]

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qgen.io.peers import nunchaku_packing as packing
from qgen.io.peers.base import Layer, Model, Plain, exporters
from qgen.io.peers.floats import dequantized
from qgen.io.peers.nunchaku import added
from qgen.io.peers.nunchaku_join import halves, stacked
from qgen.io.peers.nunchaku_linear import FORMATS, SHIFT, Linear, floats_of
from qgen.io.peers.nunchaku_model import Skeleton, compute_dtype
from qgen.io.peers.nunchaku_names import FAMILIES, Family, Place, family_named
from qgen.io.peers.nunchaku_read import TAILS
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

_OLD = {new: old for old, new in TAILS.items()}
_RECIPE = 'Quantize with Spec("int4_g64", "int4_g64", …, share=True) or Spec("nvfp4", "nvfp4_dynamic", …, share=True), adaLN in W4A16'


@exporters.register("nunchaku")
class NunchakuExport:
    """The exporter."""

    about = "Nunchaku's single file, for Nunchaku's own runners of Flux, Qwen-Image, SDXL and Z-Image"

    @staticmethod
    def write(parts: Iterable[Layer | Plain], target: Path, *, about: Model) -> list[str]:
        """Writes the file `target` (.safetensors). Needs about.config, and diffusers for the model's own list of tensors.

        Raises ValueError for a model that Nunchaku has no runner for, for a layer that its kernels cannot compute, and if one is missing.
        """
        family = family_named(about.config.get("_class_name"), about.kind)
        if family is None:
            known = ", ".join(family.models[0] for family in FAMILIES)
            raise ValueError(
                f"Nunchaku runs {known}, found {about.config.get('_class_name') or about.kind or 'no class'}"
            )
        target = Path(target)
        if target.suffix != ".safetensors":
            raise ValueError(f"Nunchaku's file is one .safetensors file, found the target {target.name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.parts-", dir=target.parent) as folder:
            file = _File(Skeleton(about), family, parts, Path(folder, "first.safetensors"))
            whole = Path(folder, "whole.safetensors")
            level(file.path, whole, file.short(), file.rank, file.metadata())
            whole.replace(target)
        return file.lines


class _File:
    """One pass over the parts into `path`. Layers that are fused wait for each other."""

    def __init__(self, model: Skeleton, family: Family, parts: Iterable[Layer | Plain], path: Path):
        self.model, self.family, self.path = model, family, path
        self.dtype: torch.dtype | None = None
        self.lines: list[str] = []
        self.kind = ""  # of all W4A4 layers
        self.ranks: dict[str, int] = {}
        self.rounded: dict[str, int] = {}
        self.waiting: dict[tuple[str, str], dict[int, Linear]] = {}
        names: set[str] = set()  # of the float model's tensors that the parts have been
        with SafetensorsWriter(path) as writer:
            for part in parts:
                self.dtype = self.dtype or compute_dtype(part)
                if isinstance(part, Plain):
                    self.model.check(part.name, tuple(part.tensor.shape))
                    names.add(part.name)
                else:
                    self.model.check(f"{part.path}.weight", part.shape)
                    names |= {f"{part.path}.weight", f"{part.path}.bias"}
                for name, tensor in self._plain(part) if isinstance(part, Plain) else self._layer(part):
                    writer.add(name, tensor)
            self.model.check_all(names)
            self._finish()
            writer.metadata.update(self.metadata())

    @property
    def rank(self) -> int:
        return max(self.ranks.values(), default=0)

    def short(self) -> dict[str, str]:
        """The low-rank factors of less rank than the file's, and their tails."""
        low = [stem for stem, rank in self.ranks.items() if rank < self.rank]
        return {f"{stem}.{self._tail(tail)}": tail for stem in low for tail in ("proj_down", "proj_up")}

    def metadata(self) -> dict[str, str]:
        """The texts by which Nunchaku's loaders know the model and the kernels."""
        fp4 = self.kind == "nvfp4"
        number = {"dtype": "fp4_e2m1_all" if fp4 else "int4", "group_size": 16 if fp4 else 64}
        weight = {**number, "scale_dtype": [None, "fp8_e4m3_nan"] if fp4 else None}
        act = {**number, "scale_dtype": "fp8_e4m3_nan" if fp4 else None}
        config = {"method": "svdquant", "weight": weight, "activation": act, "rank": self.rank}
        told = {"_class_name": self.model.kind, **self.model.config}
        return {
            "config": json.dumps(told),
            "model_class": self.family.runner,
            "quantization_config": json.dumps(config),
        }

    def _tail(self, tail: str) -> str:
        return _OLD.get(tail, tail) if self.family.old else tail

    def _plain(self, part: Plain) -> Iterator[tuple[str, Tensor]]:
        path = part.name.rpartition(".")[0]
        if any(True for _ in self.family.of_model(path)):
            raise ValueError(
                f"{path} is not quantized, and {self.family.runner} has a quantized layer there. {_RECIPE}"
            )
        yield (
            self.family.to_file(part.name),
            part.tensor.to(self.dtype) if part.tensor.is_floating_point() else part.tensor,
        )

    def _layer(self, part: Layer) -> Iterator[tuple[str, Tensor]]:
        part, lines = self.model.biased(part)
        self.lines += lines
        places = list(self.family.of_model(part.path))
        if not places:
            why = f"{self.family.runner} has a 16-bit layer there"
            self.lines.append(f"{part.path}: dequantized: {why}")
            for plain in floats_of(part, why):
                yield self.family.to_file(plain.name), plain.tensor.to(self.dtype)
        elif places[0][1].turns:
            yield from self._turns(part, *places[0][:2])
        else:
            linears = self._linears(part, places)
            for (block, place, index), linear in zip(places, linears, strict=True):
                yield from self._gather(block, place, index, linear, part.path)

    def _turns(self, part: Layer, block: str, place: Place) -> Iterator[tuple[str, Tensor]]:
        why = awq_refusal(part) or (f"{part.shape[0]} rows" if part.shape[0] % place.turns else None)
        if why:
            raise ValueError(
                f"{part.path}: Nunchaku wants it in W4A16 without smoothing or low rank, found {why}. {_RECIPE}"
            )
        linear = awq_linear(part)
        bias = torch.zeros(linear.n, dtype=part.dtype) if linear.bias is None else linear.bias
        linear = linear.with_bias(added(bias.float(), place, 1.0))
        linear = linear.reordered(packing.interleave(torch.arange(linear.n), place.turns))
        yield from self._named(f"{block}.{place.file}", write_awq(linear, self.dtype))

    def _linears(self, part: Layer, places: list[tuple[str, Place, int]]) -> list[Linear]:
        """The layer in as many halves as the file has."""
        split = places[0][1].half is not None
        part = self._rounding(part) if split else part
        gelu = places[-1][1].gelu
        why = svdq_refusal(part, unsigned=gelu and not split)
        if why:
            raise ValueError(f"{part.path}: Nunchaku's kernels cannot compute {why}. {_RECIPE}")
        if gelu and not split:
            part = _unshifted(part)
        linear = svdq_linear(part)
        self.kind = self.kind or linear.kind
        if linear.kind != self.kind:
            raise ValueError(f"{part.path} is {linear.kind} beside layers of {self.kind}: a file has one precision")
        if not split:
            return [_shifted(linear) if gelu else linear]
        widths = [place.size[1] for _, place, _ in places]
        k = linear.k * widths[0] // sum(widths)
        if k % linear.block or k * sum(widths) != linear.k * widths[0]:
            raise ValueError(
                f"{part.path}: {linear.k} inputs cannot be split {widths[0]} : {widths[1]} in blocks of {linear.block}"
            )
        left, right = halves(linear, k)
        return [left, _shifted(right) if gelu else right]

    def _rounding(self, part: Layer) -> Layer:
        """A layer whose halves were joined, with the rounding of activations that Nunchaku does."""
        if part.layout.act:
            return part
        act = {"int4_g64": "int4_g64", "nvfp4": "nvfp4_dynamic", "nvfp4_row": "nvfp4_dynamic"}.get(part.layout.weight)
        if act is None:
            return part
        self.lines.append(f"{part.path}: its activations, 16-bit here, are rounded by {self.family.runner}")
        return replace(part, layout=replace(part.layout, act=act))

    def _gather(self, block: str, place: Place, index: int, linear: Linear, path: str) -> Iterator[tuple[str, Tensor]]:
        """Writes a layer of the file once all that it holds have come."""
        key = (block, place.file)
        there = self.waiting.setdefault(key, {})
        for other in there.values():
            if not (_same(other.smooth, linear.smooth) and _same(other.down, linear.down) and other.act == linear.act):
                raise ValueError(
                    f"{path}: Nunchaku fuses it with others of {block}, and its smoothing or low rank is another. {_RECIPE}"
                )
        there[index] = linear
        if len(there) < len(place.paths):
            return
        del self.waiting[key]
        whole = there[0] if len(there) == 1 else stacked([there[i] for i in range(len(there))])
        stem = f"{block}.{place.file}"
        self.ranks[stem] = rank_of(whole)
        written = write_svdq(whole, self.ranks[stem], self.dtype)
        written.tensors["smooth_factor_orig"] = written.tensors["smooth_factor"].clone()
        yield from self._named(stem, written)

    def _named(self, stem: str, written: Written) -> Iterator[tuple[str, Tensor]]:
        for tail in written.rounded:
            self.rounded[tail] = self.rounded.get(tail, 0) + 1
        for tail, tensor in written.tensors.items():
            yield f"{stem}.{self._tail(tail)}", tensor

    def _finish(self) -> None:
        for (block, name), there in self.waiting.items():
            raise ValueError(f"{block}.{name} wants more layers than the {len(there)} that came")
        if not self.ranks:
            raise ValueError(f"nothing is quantized as {self.family.runner} wants it. {_RECIPE}")
        for tail, count in sorted(self.rounded.items()):
            self.lines.append(
                f"{tail} of {count} layers: rounded to {str(self.dtype)[6:]}, which the kernels compute in"
            )


def _unshifted(part: Layer) -> Layer:
    """The layer with a bias for inputs that are not shifted, and no shift."""
    if "shift" not in part.slots:
        return part
    _, bias = dequantized(replace(part, slots={**part.slots, "bias": part.slots["bias"].float()}))
    slots = {name: t for name, t in part.slots.items() if name != "shift"}
    return replace(part, slots={**slots, "bias": bias}, layout=replace(part.layout, act="int4_g64"))


def _shifted(linear: Linear) -> Linear:
    """An INT4 layer whose bias takes away what Nunchaku's shift of the input adds; NVFP4 as it is."""
    if linear.kind != "int4":
        return linear
    bare = replace(linear, bias=None, dtype=torch.float32, shift=torch.tensor(SHIFT))
    _, constant = dequantized(bare.layer("", FORMATS["int4"]))
    return linear.with_bias((0.0 if linear.bias is None else linear.bias.float()) - constant)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
