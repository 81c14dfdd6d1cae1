r"""Packed layers as ComfyUI's own operations, so that whatever works on its layers works on these.

ComfyUI moves, patches and times a model by what it finds on each layer. A packed layer offers the same handles:

    moving, low memory   the kernel is chosen for where inputs are; elsewhere the bytes wait in its layout and are copied for each call
    LoRA                 ΔW = Σ sᵢ Bᵢ Aᵢ becomes more rank of the low-rank branch, when the model is loaded (see `adapt`)
    other patches        what is no plain LoRA (DoRA, LoHa, full differences) is computed by ComfyUI against the dequantized weight,
                         and the difference kept as float weights beside the packed ones
    hooks, merging       `convert_weight` gives the dequantized weight, `set_weight` overrides it, the placeholder put back ends that
    weight functions     of other node packs get the dequantized weight on each call
"""

__all__ = ["Absent", "ComfyLayer", "adapt", "adopt", "comfy_layer", "packed_layers"]

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qgen.nn.kinds import empty
from qgen.nn.lora import append_rank, cut_rank
from qgen.nn.packed import Packed, Placeholder


class Absent(Placeholder):
    """The placeholder of a weight, which also tells ComfyUI's accounting that it takes no memory."""

    nbytes = 0

    def numel(self) -> int:
        return 0

    nelement = numel


class ComfyLayer:
    """Mixin before a packed layer; `adopt` makes one."""

    comfy_cast_weights = True  # this layer copies its weights to where its input is, when it must

    def start(self) -> None:
        """What a packed layer lacks to be one of these."""
        self.weight_function: list = []
        self.bias_function: list = []
        self.adapted: tuple = ()  # ComfyUI's patches that are in the low-rank branch and in `delta`
        self.home = ""  # type of the device for which the kernel was chosen
        self.register_parameter("delta", None)  # differences of the weight that have no low rank
        self.register_parameter("override", None)  # a whole weight that stands for this one

    @property
    def weight(self) -> Tensor:
        """A placeholder of the float weight, see `Packed.weight`."""
        zero = torch.zeros((), dtype=self.compute_dtype, device=self.codes.device)
        return zero.expand(self._weight_shape()).as_subclass(Absent)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, Placeholder) or all(step == 0 for step in value.stride()):
            self.override = None  # the placeholder comes back, from a backup of ComfyUI's
        else:
            self.override = nn.Parameter(value.detach().to(self.compute_dtype), requires_grad=False)

    # -- what ComfyUI's patching calls ---------------------------------------------------------------------------------
    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: Any) -> Tensor:
        """The values that the placeholder stands for."""
        return self.dequantize(weight.dtype).to(weight.device)

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False, **_: Any
    ):
        """Lets a whole float weight stand for the packed one."""
        if return_weight:
            return weight
        self.weight = weight.to(self.codes.device)

    # -- where it is ---------------------------------------------------------------------------------------------------
    def _apply(self, fn, recurse=True):
        """Moves everything and casts nothing; the layout stays that of the kernel, wherever the bytes wait."""
        self._move(fn(torch.empty(0, dtype=torch.uint8, device=self.codes.device)).device)
        return self

    def _move(self, device: torch.device) -> None:
        for name, p in self._parameters.items():
            if p is not None and p.device != device:
                self._parameters[name] = nn.Parameter(p.detach().to(device), requires_grad=False)

    def _ready(self, device: torch.device) -> None:
        """Packs for the kernel that serves `device`, if that is not done yet."""
        if self.kernel is None or self.home != device.type:
            here = self.codes.device
            self.fill(self.canonical())
            self._move(device)
            self.prepare()
            self.home = device.type
            self._move(here)

    def _beside(self, x: Tensor) -> "ComfyLayer":
        """Itself, or where its bytes wait elsewhere a passing copy of it beside x."""
        if self.codes.device == x.device:
            return self
        passing = object.__new__(type(self))
        moved = {
            n: None if p is None else p.detach().to(x.device, non_blocking=True) for n, p in self._parameters.items()
        }
        passing.__dict__.update({**self.__dict__, "_parameters": moved})
        return passing

    # -- what it computes ----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            _stop_if_asked()
        wanted, x = x.dtype, x.to(self.compute_dtype)
        functions = [f for f in self.weight_function if not _is_lora(f)]
        changed = self.override is not None or functions or self.bias_function
        if changed and not self.timed:
            return self._dense(x, self._weight_now(x, functions), self._bias_now(x)).to(wanted)
        self._ready(x.device)
        layer = self._beside(x)
        y = super(ComfyLayer, layer).forward(x)
        if changed:  # tables over timesteps are for the layer's own weight: what others made of it comes on top
            own = self.dequantize(x.dtype).to(x.device)
            y = y + self._dense(x, self._weight_now(x, functions) - own, self._bias_now(x))
        elif layer.delta is not None:
            y = y + self._dense(x, layer.delta, None)
        return y.to(wanted)

    def _weight_now(self, x: Tensor, functions: list) -> Tensor:
        """The float weight beside x, of which other packs see and change a copy."""
        if self.override is not None:
            weight = self.override.detach()
        else:
            weight = self.dequantize() if self.delta is None else self.dequantize() + self.delta
        weight = weight.to(x.device, x.dtype, copy=True)
        for f in functions:
            weight = f(weight)
        return weight

    def _bias_now(self, x: Tensor) -> Tensor | None:
        """The same of the bias; of a timed layer, which has it in its tables, what functions add to it."""
        bias = self.canonical().get("bias")
        if bias is None and self.timed and self.bias_function:
            bias = x.new_zeros(self.n)
        if bias is not None:
            bias = bias.to(x.device, x.dtype, copy=True)
            for f in self.bias_function:
                bias = f(bias)
        return bias

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        return self._conv_forward(x, weight, bias) if hasattr(self, "_conv_forward") else F.linear(x, weight, bias)

    # -- patches -------------------------------------------------------------------------------------------------------
    def adapt(self, patches: Any, key: str) -> None:
        """Makes the layer what its own numbers and ComfyUI's `patches` of its weight say, and nothing else.

        patches: (strength, what, strength of the model's own weight, offset, function), as `ModelPatcher.patches` holds them. Those of
        strength 0 that leave the model's own weight alone are left out, so that the layer is exactly what it was.
        """
        patches = tuple(p for p in patches if p[0] != 0 or p[2] != 1)
        if len(patches) == len(self.adapted) and all(map(_same, patches, self.adapted)):
            return
        self.fill(self.canonical())  # the kernel is chosen anew, where the next input is
        cut_rank(self)
        self.delta, self.adapted = None, ()
        factors = [_factors(patch, self._weight_shape()) for patch in patches]
        rest = [patch for patch, found in zip(patches, factors, strict=True) if found is None]
        if rest:
            from comfy.lora import calculate_weight

            weight = self.dequantize(torch.float32)
            made = calculate_weight(rest, weight.clone(), key)
            self.delta = nn.Parameter((made - weight).to(self.compute_dtype), requires_grad=False)
        pairs = [found for found in factors if found is not None]
        if pairs:
            append_rank(self, pairs)
        self.adapted = patches


@cache
def _class_of(packed: type) -> type:
    """ComfyLinear for QuantLinear, and so on: the mixin before the packed layer's class."""
    return type(packed.__name__.replace("Quant", "Comfy"), (ComfyLayer, packed), {"__module__": __name__})


def adopt(layer: Packed, dtype: torch.dtype | None = None) -> Packed:
    """The packed layer itself, from now on one of ComfyUI's. dtype: in which it computes, if another than now."""
    layer.__class__ = _class_of(type(layer))
    layer.start()
    layer.fill(layer.canonical())
    layer.compute_dtype = dtype or layer.compute_dtype
    return layer.eval()


def comfy_layer(
    layout: Any, slots: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype, like: nn.Module
) -> Packed:
    """A layer from canonical tensors, in the place of ComfyUI's float layer `like`, which gives a convolution its geometry.

    shape: of the float weight; ValueError unless it is that of `like`. dtype: in which the model computes.
    """
    made = empty(like, layout, dtype)
    if tuple(made._weight_shape()) != tuple(shape):
        raise ValueError(
            f"a layer of shape {tuple(shape)} cannot take the place of one of {tuple(made._weight_shape())}"
        )
    made.fill(slots)
    return adopt(made, dtype)


def packed_layers(module: nn.Module) -> Iterator[tuple[str, Packed]]:
    """Paths and packed layers of a model."""
    return ((path, layer) for path, layer in module.named_modules() if isinstance(layer, ComfyLayer))


def adapt(patcher: Any, *_: Any) -> None:
    """ComfyUI's ON_LOAD callback: every packed layer takes the patches of the patcher that was loaded, and drops those of the last one."""
    for path, layer in packed_layers(patcher.model):
        key = f"{path}.weight"
        layer.adapt(patcher.patches.get(key, ()), key)


def _stop_if_asked() -> None:
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def _is_lora(function: Any) -> bool:
    """Whether ComfyUI put it there for a patch that is in the layer already."""
    return getattr(function, "is_lowvram_patch", False) or type(function).__name__ == "LowVramPatch"


def _same(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and a[1] is b[1] and a[2:4] == b[2:4] and a[4] is b[4]


def _factors(patch: tuple, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """A (R, K) and s B (N, R) of one patch, float32; None if it is no plain LoRA. The scale is on B."""
    strength, what, own, offset, function = patch
    weights = getattr(what, "weights", None) if type(what).__name__ == "LoRAAdapter" else None
    if weights is None or own != 1 or function is not None or len(weights) != 6:
        return None
    up, down, alpha, middle, dora, reshaped = weights
    if middle is not None or dora is not None or reshaped is not None:
        return None
    a, b = down.detach().float().flatten(1), up.detach().float().flatten(1)
    b = b * (strength * (float(alpha) / a.shape[0] if alpha is not None else 1.0))
    n, k = shape[0], torch.Size(shape[1:]).numel()
    if offset is not None:  # of a fused layer: some rows, or some columns
        axis, start, length = offset
        if axis == 0 and b.shape[0] == length and start + length <= n:
            b = F.pad(b, (0, 0, start, n - start - length))
        elif axis == 1 and len(shape) == 2 and a.shape[1] == length and start + length <= k:
            a = F.pad(a, (start, k - start - length))
        else:
            return None
    return (a, b) if a.shape[1] == k and b.shape[0] == n else None
