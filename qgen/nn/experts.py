"""Mixtures of experts whose matrices are stacked in one parameter (E, N, K), opened into ordinary linear layers.

transformers and diffusers keep all experts of a block in one tensor and read `stack[i]` in a loop:

    F.linear(x, self.gate_up_proj[i])        or, transposed,        x @ self.gate_up_proj[i]

`unstack` puts `Experts` in the parameter's place: E linear layers, whose item i is an `Expert`, an object that torch's functions take where
they want a weight, and that calls the layer instead. So hooks see every expert, and what holds for linear layers (statistics, methods,
packing, files, adapters) holds for experts. The loop must be what runs, not one product of the whole stack: each library's switch for
that is set on the opened module alone.
"""

__all__ = ["Expert", "Experts", "Opened", "opened", "restack", "unstack"]

import contextlib
import copy
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WIDE = 32  # smaller matrices are tables of positions or shifts


class Expert:
    """One matrix of a stack, as torch's functions see it: multiplying by it calls its layer. For anything else there is no tensor."""

    def __init__(self, layer: nn.Module, transposed: bool):
        self.layer, self.transposed = layer, transposed

    @property
    def T(self) -> "Expert":
        return Expert(self.layer, not self.transposed)

    def t(self) -> "Expert":
        return self.T

    @property
    def shape(self) -> torch.Size:
        n, k = self.layer.weight.shape
        return torch.Size((k, n) if self.transposed else (n, k))

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.weight.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, rest = func.__name__, (*args, *(kwargs or {}).values())
        given = [a for a in rest if isinstance(a, cls)]
        linear, product = name == "linear", name in ("matmul", "mm", "__matmul__")
        if len(given) == 1 and rest[1] is given[0] and (linear or product) and given[0].transposed == product:
            out = given[0].layer(rest[0])
            return out if len(rest) < 3 or rest[2] is None else out + rest[2]
        raise TypeError(
            f"an expert of a quantized model is multiplied by as F.linear(x, w) or x @ w.T, found {name}(); its values are "
            "expert.layer.weight, or expert.layer.dequantize() once it is packed"
        )


class Experts(nn.ModuleList):
    """E linear layers (N, K) in place of a parameter (E, N, K), or (E, K, N) where it is `transposed`."""

    def __init__(self, stack: Tensor, transposed: bool):
        layers = []
        for matrix in stack:
            n, k = (matrix.T if transposed else matrix).shape
            layer = nn.Linear(k, n, bias=False, device="meta")
            layer.weight = nn.Parameter((matrix.T if transposed else matrix).detach(), stack.requires_grad)
            layers.append(layer)
        super().__init__(layers)
        self.transposed = transposed

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (slice, list)) or (isinstance(index, Tensor) and index.numel() != 1):
            raise TypeError(
                "quantized experts are read one by one: model.set_experts_implementation('eager') before qgen.quantize"
            )
        return Expert(self._modules[str(int(index))], self.transposed)

    def layers(self) -> list[nn.Module]:
        """The linear layers themselves."""
        return list(self._modules.values())

    @property
    def stack(self) -> Tensor:
        """The parameter that these layers stand for, in one tensor again. ValueError if any of them is not a float layer."""
        if any(type(layer) is not nn.Linear for layer in self.layers()):
            raise ValueError("packed experts have no stack")
        made = torch.stack([layer.weight.detach() for layer in self.layers()])
        return made.mT.contiguous() if self.transposed else made


@dataclass
class Opened:
    """What `unstack` did at one module: the parameter it took out, and the attribute that chose how products are made."""

    path: str
    owner: nn.Module
    name: str
    parameter: nn.Parameter
    switch: tuple[str, Any]


def unstack(module: nn.Module, within: Collection[str] | None = None) -> list[Opened]:
    """Opens the stacks of experts of `module`, in place; its function stays. within: paths of experts; only stacks that hold one of them.

    Only modules whose library says how they read their experts (transformers' experts interface, diffusers' grouped products) are opened.
    """
    made = []
    parents = None if within is None else {path.rpartition(".")[0] for path in within}
    for path, part in list(module.named_modules()):
        transposed = _reads_by_item(part)
        if transposed is None:
            continue
        for name, p in list(part.named_parameters(recurse=False)):
            where = f"{path}.{name}" if path else name
            if p.ndim != 3 or min(p.shape[1:]) < _WIDE or (parents is not None and where not in parents):
                continue
            switch = made[-1].switch if made and made[-1].owner is part else _one_by_one(part)
            opened = Experts(p, transposed)
            opened.train(part.training)
            del part._parameters[name]
            part.add_module(name, opened)
            made.append(Opened(where, part, name, p, switch))
    return made


@contextlib.contextmanager
def opened(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the stacks of `modules` are layers; those that hold packed experts at its end stay so."""
    made = [one for module in modules for one in unstack(module)]
    try:
        yield
    finally:
        restack(made)


def restack(opened: list[Opened]) -> None:
    """Undoes `unstack` where no expert of a stack is packed."""
    for one in opened:
        found = one.owner._modules.get(one.name)
        if isinstance(found, Experts) and all(type(layer) is nn.Linear for layer in found.layers()):
            del one.owner._modules[one.name]
            one.owner.register_parameter(one.name, one.parameter)
            if not any(isinstance(child, Experts) for child in one.owner.children()):
                setattr(one.owner, *one.switch)


def _reads_by_item(part: nn.Module) -> bool | None:
    """Whether a module's stacks are transposed; None for a module that is not known to read them one by one."""
    if hasattr(part, "is_transposed") and hasattr(getattr(part, "config", None), "_experts_implementation_internal"):
        return bool(part.is_transposed)
    return True if "use_grouped_mm" in vars(part) and hasattr(part, "_run_experts_for_loop") else None


def _one_by_one(part: Any) -> tuple[str, Any]:
    """Has a module loop over its experts; returns the attribute that was changed and its value before."""
    if hasattr(part, "use_grouped_mm"):
        before, part.use_grouped_mm = part.use_grouped_mm, False
        return "use_grouped_mm", before
    before, part.config = part.config, copy.copy(part.config)  # other modules, and other models, share the config
    part.config._experts_implementation_internal = "eager"
    return "config", before
