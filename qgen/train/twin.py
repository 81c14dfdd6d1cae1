r"""Twin: a packed layer while it is trained. It answers in the layer's place, with float parts ("leaves") where the packed layer has codes.

    leaf      shape              stands for
    master    (N, Kp)            the weight before rounding, in the basis of the codes
    lora_a    (r, Kp)            W = Q(master + lora_b · lora_a): merged before it is rounded, so that it ends in the codes
    lora_b    (N, r)
    rise      (N, Kp)            which neighbour on the grid each weight takes, see `rounding`
    scale     (N, G) or less     logarithm of a factor on the stored scales (on the global scale where scales are 8-bit numbers)
    act       (G,) or ()         logarithm of a factor on static activation scales
    step      (T,)               logarithm of a factor on their table over timesteps
    down, up, bias, t_bias       the slots of these names
    aux_l, aux_r                 a float branch beside the weight, up · gate · down of the rounded input; gone at the end

All slots pass through the dtype they are stored in, so that the forward pass of the last step is the packed layer's own. The layer is not
replaced: an attribute `forward` on the instance covers the class's, and taking it away leaves the model as it was.
"""

__all__ = ["PLAIN_ONLY", "Twin"]

from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qgen import formats
from qgen.formats import QTensor
from qgen.kernels import reference
from qgen.nn import clock, known
from qgen.nn.conv import unfold
from qgen.nn.conv_nd import unfold_nd
from qgen.nn.kinds import kind_of, matrix
from qgen.nn.packed import Packed
from qgen.train import fake
from qgen.train.drop import Drop
from qgen.train.rounding import Rounding
from qgen.train.zeroth import Probe

PLAIN_ONLY = ("master", "lora_a", "lora_b", "rise")  # leaves of which codes are made one by one
_SLOTS = ("down", "up", "bias", "t_bias")


class Twin:
    """See above. rates: step of the optimizer for each leaf. gate: (r,) of the auxiliary branch, or None = all ones. rounding: of the leaf
    "rise". drop: leaves part of the input unrounded, None = all of it is rounded."""

    def __init__(self, path: str, layer: Packed, original: nn.Module | None = None, probe: Probe | None = None):
        self.path, self.layer, self.probe = path, layer, probe
        self.kernel = layer.kernel
        self.format = formats.get(layer.weight_format)
        self.leaves: dict[str, Tensor] = {}
        self.rates: dict[str, float] = {}
        self.gate: Tensor | None = None
        self.rounding: Rounding | None = None
        self.drop: Drop | None = None
        self._settled = False
        self._original = original

    @cached_property
    def slots(self) -> dict[str, Tensor]:
        """Canonical slots. The layer lies in memory in the same layout meanwhile, so that no tensor is there twice."""
        if self.kernel is not None:
            self.layer.prepare("reference")
        return self.layer.canonical()

    def wear(self) -> None:
        """Answers in the layer's place if there is anything to train in it."""
        self.layer.__dict__.pop("forward", None)
        if self.leaves or self._settled:
            self.layer.__dict__["forward"] = self.__call__

    def release(self) -> None:
        """The layer is as it was, with its own kernel."""
        self._settled = False
        self.layer.__dict__.pop("forward", None)
        if self.__dict__.pop("slots", None) is not None and self.kernel is not None:
            self.layer.prepare(self.kernel)

    # -- parts that can be trained -------------------------------------------------------------------------------------
    @property
    def plain(self) -> bool:
        """Whether codes can be chosen one by one."""
        return self.format.plain

    @property
    def mean_step(self) -> float:
        """Mean distance of two neighbouring integers of the weight's grid, in units of weight: what a useful change is measured by."""
        if not self.plain:
            raise ValueError(f"{self.path}: {self.format.name} has no step; leave its weight alone")
        return float(self.format.step(self.slots["scales"], self.slots.get("global_scale")).mean())

    def wanted(self) -> Tensor | None:
        """The teacher's weight in the basis of the codes, (N, Kp) float32: ((W − up · down) · smooth) H. None without a teacher's layer."""
        if self._original is None:
            return None
        w = matrix(self._original).float().to(self.slots["codes"].device)
        slots = self.slots
        if "down" in slots:
            w = w - slots["up"].float() @ slots["down"].float()
        if "smooth" in slots:
            w = w * slots["smooth"].float()
        w = nn.functional.pad(w, (0, self._width - w.shape[1]))
        return reference.hadamard_blocks(w, self.layer.hadamard) if self.layer.hadamard else w

    def open(self, name: str, value: Tensor, rate: float) -> None:
        """Makes a leaf of `value`, float32, that is trained with steps of `rate`."""
        if name in PLAIN_ONLY and not self.plain:
            raise ValueError(f"{self.path}: codes of {self.format.name} cannot be trained one by one")
        self.leaves[name] = value.detach().float().clone().requires_grad_()
        self.rates[name] = rate

    def open_master(self, rate: float) -> None:
        """The weight before rounding, which starts as `fake.anchor` says; `rate` in units of the mean step."""
        self.open("master", fake.anchor(self._qtensor(), self.wanted()), rate * self.mean_step)

    def open_rounding(self, rate: float) -> bool:
        """Which neighbour each weight takes; `rate` in units of their mean distance. False where codes cannot be chosen one by one."""
        wanted = self.wanted() if self.plain else None
        if wanted is None:
            return False
        self.rounding = Rounding(self._qtensor(), wanted)
        self.open("rise", self.rounding.start, rate * self.rounding.gap)
        return True

    def open_slot(self, name: str, rate: float) -> bool:
        """Trains a float slot that the layer has; `rate` in units of its mean magnitude. False if it has none."""
        if name not in self.slots:
            return False
        value = self.slots[name].float()
        self.open(name, value, rate * max(float(value.abs().mean()), 1e-6))
        return True

    def open_scale(self, rate: float, share: str = "block") -> bool:
        """Trains factors on the scales of blocks, or one for each row, or for the layer. False where no scale is a float."""
        target = self._scaled_slot()
        if target is None:
            return False
        like = self.slots[target]
        shape = {"block": like.shape, "row": (*like.shape[:1], *[1] * (like.ndim - 1)), "layer": (1,) * like.ndim}
        self.open("scale", torch.zeros(shape[share], device=like.device), rate)
        return True

    def open_steps(self, rate: float) -> bool:
        """Trains static activation scales, and their table over timesteps where there is one. False for scales measured at run time."""
        for name, slot in (("act", "act_scale"), ("step", "t_scale")):
            if slot in self.slots:
                self.open(name, torch.zeros_like(self.slots[slot], dtype=torch.float32), rate)
        return "act" in self.leaves

    def close(self, name: str) -> None:
        """Takes a leaf away."""
        self.leaves.pop(name, None)
        self.rates.pop(name, None)
        if name == "rise":
            self.rounding = None

    def settle(self, slots: dict[str, Tensor]) -> None:
        """Answers from these canonical slots from now on; the layer keeps its own until they are installed."""
        self.__dict__["slots"] = {**self.slots, **slots}
        self._settled = True

    def hide(self) -> dict[str, Tensor]:
        """Takes the auxiliary branch out of `leaves` and returns it."""
        return {name: self.leaves.pop(name) for name in ("aux_l", "aux_r") if name in self.leaves}

    def project(self) -> None:
        """Keeps the weight before rounding within its range, beyond which it would have no gradient to come back by."""
        if "master" in self.leaves and "lora_a" not in self.leaves:
            with torch.no_grad():
                scales, shared = (self._scale(name) for name in ("scales", "global_scale"))
                step = self.format.step(scales, shared)[..., None]
                zero = self.slots.get("zero")
                offset = 0.0 if zero is None else zero.float()[..., None]
                blocks = self.format.blocks(self.leaves["master"]) - offset
                low, high = step * self.format.element.min, step * self.format.element.max
                self.leaves["master"].copy_((blocks.maximum(low).minimum(high) + offset).flatten(-2))

    # -- forward -------------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor) -> Tensor:
        kind = kind_of(self.layer)
        if kind == "linear" and "known_x" in self.slots:
            stored = {name: self.slots[name] for name in known.KNOWN}
            like = SimpleNamespace(**stored, act_format=self.layer.act_format)
            return known.apply(like, x, lambda x: self._timed(x, self._rows))
        if kind == "linear":
            return self._timed(x, self._rows)
        return self._timed(x, self._conv2d) if kind == "conv2d" else self._conv_nd(x)

    def weight(self) -> Tensor:
        """The residual weight (N, Kp) float32 on the grid of its format."""
        scales, shared, zero = self._scale("scales"), self._scale("global_scale"), self.slots.get("zero")
        if self.rounding is not None:
            return self.rounding.weight(self._leaf("rise"))
        if "master" in self.leaves:
            return fake.weights(self.format, self._unrounded(), scales, shared, zero)
        if "scale" not in self.leaves:
            return self._qtensor().dequantize()
        code = self.format.element.decode(self.format.unpack(self.slots["codes"]))
        return self.format.scaled(code, scales, shared, zero)

    def _timed(self, x: Tensor, run: Any) -> Tensor:
        if not self.layer.timed:
            return run(x)
        step = self.slots.get("t_scale")
        if step is not None and "step" in self.leaves:
            step = step * self._leaf("step").exp()
        parts = {"t_shift": self.slots.get("t_shift"), "t_bias": self._slot("t_bias"), "t_scale": step}
        whole = {name: self.slots.get(name) for name in ("t_edges", "t_mix")}
        whole["clock"] = self.layer.clock
        shape = {"kernel_size": self.layer.kernel_size} if hasattr(self.layer, "kernel_size") else {}
        return clock.apply(SimpleNamespace(**parts, **whole, **shape), x, run)

    def _conv2d(self, x: Tensor) -> Tensor:
        rows, height, width = unfold(x, self.layer)
        return self._rows(rows).reshape(x.shape[0], height, width, self.layer.n).permute(0, 3, 1, 2)

    def _conv_nd(self, x: Tensor) -> Tensor:
        batched = x if x.ndim == len(self.layer.kernel_size) + 2 else x[None]
        rows, size = unfold_nd(batched, self.layer)
        y = self._timed(rows, self._rows).mT.reshape(len(batched), self.layer.n, *size)
        return y if batched is x else y[0]

    def _rows(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            slots, layer = self.slots, self.layer
            xh = reference.transform_act(x, self._width, slots.get("smooth"), slots.get("shift"), layer.hadamard)
            if layer.act_format:
                scale = slots.get("act_scale")
                if scale is not None and "act" in self.leaves:
                    scale = scale.float() * self._leaf("act").exp()
                rounded = fake.activations(xh, layer.act_format, scale)
                xh = rounded if self.drop is None else self.drop(self.path, xh, rounded)
            y = xh @ self.weight().T
            if "aux_l" in self.leaves:
                inner = xh @ self.leaves["aux_r"].T
                y = y + (inner if self.gate is None else inner * self.gate) @ self.leaves["aux_l"].T
            if "down" in slots:
                y = y + (x.float() @ self._slot("down").float().T) @ self._slot("up").float().T
            if "bias" in slots:
                y = y + self._slot("bias").float()
            return y.to(x.dtype)

    # -- and back ------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def packed(self) -> dict[str, Tensor]:
        """Canonical slots of the trained layer: those that it had, no others."""
        made = dict(self.slots)
        for name in _SLOTS:
            if name in self.leaves:
                made[name] = self._stored(name, self.leaves[name])
        for name in ("scales", "global_scale"):
            if name in made:
                made[name] = self._scale(name).to(made[name].dtype)
        for name, slot in (("act", "act_scale"), ("step", "t_scale")):
            if name in self.leaves:
                made[slot] = made[slot] * self.leaves[name].exp()
        if "master" in self.leaves:
            codes = self.format.encode(self._unrounded(), made["scales"], made.get("global_scale"), made.get("zero"))
            made["codes"] = self.format.pack(codes)
        if self.rounding is not None:
            made["codes"] = self.rounding.codes(self.leaves["rise"])
        return {name: t.detach().contiguous() for name, t in made.items()}

    # -- inside --------------------------------------------------------------------------------------------------------
    @property
    def _width(self) -> int:
        return self.slots["codes"].shape[-1] * 8 // self.format.bits

    def _qtensor(self) -> QTensor:
        s = self.slots
        return QTensor(s["codes"], s["scales"], s.get("global_scale"), s.get("zero"), self.format.name)

    def _unrounded(self) -> Tensor:
        w = self.leaves["master"]
        return w + self.leaves["lora_b"] @ self.leaves["lora_a"] if "lora_a" in self.leaves else w

    def _scaled_slot(self) -> str | None:
        for name in ("scales", "global_scale"):
            t = self.slots.get(name)
            if self.plain and t is not None and t.is_floating_point() and t.element_size() > 1:
                return name
        return None

    def _scale(self, name: str) -> Tensor | None:
        """Stored scales, times their trained factor where they are what is trained."""
        t = self.slots.get(name)
        if t is None or "scale" not in self.leaves or name != self._scaled_slot():
            return t
        soft = t.float() * self._leaf("scale").exp()
        exact = self.format.store(soft.detach()).float() if name == "scales" else soft.detach()
        return fake.through(exact, soft)

    def _slot(self, name: str) -> Tensor | None:
        if name in self.leaves:
            leaf = self._leaf(name)
            return fake.through(self._stored(name, leaf.detach()).float(), leaf)
        return self.slots.get(name)

    def _stored(self, name: str, t: Tensor) -> Tensor:
        dtype = self.slots[name].dtype
        top = torch.finfo(dtype).max
        return t.clamp(-top, top).to(dtype)

    def _leaf(self, name: str) -> Tensor:
        """A leaf, with the noise of a zeroth-order estimate if there is one going on."""
        leaf = self.leaves[name]
        return leaf if self.probe is None else self.probe(f"{self.path}:{name}", leaf)
