"""What our quantizers for diffusers and for transformers share: both stream tensors into a model that was built on meta.

Loading a checkpoint of ours: the layers are swapped before the first tensor arrives, tensors are verified, and the slots keep the dtype
of the file, whatever dtype the user asks for. Quantizing on the fly: a layer, or a stack of experts, is swapped when its weight arrives.
"""

__all__ = ["Core", "describe"]

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgen.errors import QgenError
from qgen.io import onthefly, skeleton
from qgen.io.config import QGenConfig
from qgen.io.files import Files, scan_files
from qgen.io.header import Header, header_of, note
from qgen.nn.experts import Experts, restack, unstack
from qgen.nn.packed import CAST_SLOTS, Packed
from qgen.recipe import Recipe


class Core:
    """State of one loading. Goes before the library's base class, whose constructor sets `quantization_config` and `pre_quantized`."""

    quantization_config: QGenConfig
    pre_quantized: bool
    header: Header | None = None
    where: Path | None = None

    # -- a checkpoint of ours -------------------------------------------------------------------------------------------
    def open(self, paths: list[Any]) -> Files:
        """Reads and checks the headers of the files that the library is about to load."""
        files = scan_files([Path(path) for path in paths])
        self.where = Path(paths[0]).parent
        self.header = header_of(files, self.where)
        return files

    def swap(self, model: nn.Module, files: Files, dtype: torch.dtype) -> None:
        skeleton.swap(model, skeleton.plan(model, self.header, files, self.where, dtype))

    def keeps(self, model: nn.Module, name: str) -> bool:
        """Whether a tensor must keep the dtype of the file: the slots of packed layers that a cast would change."""
        path, _, slot = name.rpartition(".")
        module = model.get_submodule(path) if path else model
        return isinstance(module, Packed) and slot not in CAST_SLOTS

    # -- on the fly -----------------------------------------------------------------------------------------------------
    def begin(self, model: nn.Module, skip: list[str]) -> None:
        """Plans which weights to quantize. Stacks of experts are opened for the plan alone: they arrive as one tensor, by its name."""
        made = unstack(model)
        try:
            self.steps = onthefly.steps(model, self.quantization_config.recipe, tuple(skip))
        finally:
            restack(made)
        self.stacks = {one.path for one in made} & {path.rpartition(".")[0] for path in self.steps}
        self.rows: list[dict] = []

    def quantizes(self, model: nn.Module, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        if name in self.stacks:
            return not isinstance(model.get_submodule(path)._modules.get(leaf), Experts)
        return leaf == "weight" and path in self.steps and not isinstance(model.get_submodule(path), Packed)

    def quantize(self, model: nn.Module, name: str, weight: Tensor, dtype: torch.dtype) -> list[str]:
        """Puts packed layers in the place of what `name` belongs to; returns the paths of the layers that now hold it."""
        if name in self.stacks:
            return self._quantize_experts(model, name, weight, dtype)
        path = name.rpartition(".")[0]
        layer, row = onthefly.quantize(model.get_submodule(path), weight, self.steps[path], dtype)
        self.rows.append(row)
        skeleton.swap(model, skeleton.Plan({path: layer}))
        return [path]

    def _quantize_experts(self, model: nn.Module, name: str, stack: Tensor, dtype: torch.dtype) -> list[str]:
        """The same for a stack of experts (E, N, K) or (E, K, N), one matrix after the other; those that stay float are views of it."""
        unstack(model, {f"{name}.0"})
        experts: Any = model.get_submodule(name)
        paths = []
        for number, (layer, matrix) in enumerate(zip(experts.layers(), stack, strict=True)):
            path, weight = f"{name}.{number}", matrix.T if experts.transposed else matrix
            if path in self.steps:
                packed, row = onthefly.quantize(layer, weight, self.steps[path], dtype)
                self.rows.append(row)
                skeleton.swap(model, skeleton.Plan({path: packed}))
            else:
                layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
            paths.append(path)
        return paths

    # -- both -----------------------------------------------------------------------------------------------------------
    def end(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        """After the last tensor: kernels, recipe and report."""
        for path, layer in model.named_modules():
            if isinstance(layer, Packed) and any(p.device.type == "meta" for p in layer.parameters(recurse=False)):
                raise QgenError(
                    f"{path!r} has no data after loading: device_map must not put packed layers on disk or on the CPU of a GPU model; "
                    "load to one device, then use enable_group_offload or enable_model_cpu_offload"
                )
        _align(model)
        header = self.header
        if header is None:
            header = Header((), {}, recipe=self.quantization_config.recipe, report=self.rows)
        skeleton.finish(model, header, buffers=str(dtype)[6:] == header.model.get("dtype"))
        for row in model.qgen_report if self.header is None else ():
            row["kernel"] = model.get_submodule(row["path"]).kernel
        describe(model)


def _align(model: nn.Module) -> None:
    """Copies tensors that lie at odd places of a mapped file: MKL rounds differently by alignment, and the file may change under us."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def describe(model: nn.Module) -> None:
    """Lets `model.state_dict()` carry what a header needs; once."""
    if note not in model._state_dict_hooks.values():
        model.register_state_dict_post_hook(note)


def config_of(model: nn.Module, recipe: Recipe | None) -> QGenConfig:
    """The config for a model that was quantized after loading."""
    recipe = recipe or getattr(model, "qgen_recipe", None)
    model.qgen_recipe = recipe = recipe or Recipe(None, name="unknown", about="layers were packed one by one")
    describe(model)
    return QGenConfig(recipe)
