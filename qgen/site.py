r"""Site and Draft: where quantization happens, and a layer on its way from float to packed.

A Draft holds the float weight W (N, K) in the raw basis and everything methods decide about it. What remains to be quantized is derived,
never stored:

    target = ((W − up · down) · diag(smooth)) H        so that   x Wᵀ = ((x / smooth) H) targetᵀ + (x downᵀ) upᵀ

Layers that read one input form one Draft, stacked along N: they share `smooth` and `down`. Convolutions arrive unfolded.
"""

__all__ = ["Draft", "Site"]

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qgen import formats
from qgen.formats import QTensor
from qgen.kernels import reference
from qgen.timed import factored

if TYPE_CHECKING:
    from qgen.recipe import Spec


@dataclass(frozen=True)
class Site:
    """One place that can be quantized.

    path: module path in the denoiser. kind: "linear" or "conv2d". block: path of the repeated unit it lives in ("" = none).
    order: position in execution order. shares: name of the input it shares with other sites (observed once). shape: (N, K), for a
    convolution K = channels · kernel height · kernel width. tokens: rows of the input seen by the probe. after: class name of the module
    that made its input, where the probe saw one ("GELU", "SiLU", …). role: "inside" a repeated block, "context" (inside, and reading what
    other blocks read too: text for cross-attention), "outside" (embedders, heads), or "vector" (one row per sample: time embeddings,
    modulation). parts: channels of the tensors that were concatenated to its input, () where it was seen to be one.
    """

    path: str
    kind: str
    block: str
    order: int
    shares: str
    shape: tuple[int, int]
    tokens: int = 0
    after: str = ""
    role: str = "inside"
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A layer (or several that share an input) being quantized. Methods take one and return a better one.

    weight: (N, K) float32, raw basis, never changed. bias: (N,) float32 or None. bias_fix: (N,) added to it by
    bias correction. smooth: (K,) or None. down: (R, K), up: (N, R) or None.
    shift: () added to the raw input, or None. qweight: the rounded target, or None = not rounded yet.
    clip: factor on the range of each block of weights, (N, Kp / block) or 1. edges: (bins - 1,) timesteps between bins, None = one bin.
    center: (T, K) added to the input by bin; `inputs`, `output`, statistics are of the centred rows. steps: (T,) static activation
    scales by bin, times ratio (Kp / block of act,). fixes: (T, N) more bias by bin. T = bins, and a last row for all of them together where
    there are several. offsets: (T,) how much of the pattern dither, (K,), is added to the input besides, by bin. known: (P, K) raw rows
    that keep the float layer's output, see `qgen.nn.known`; statistics are without them.
    dtype: in which smooth, down and up are stored.
    log: what methods report, by name.
    """

    sites: tuple[Site, ...]
    spec: "Spec"
    weight: Tensor
    bias: Tensor | None = None
    bias_fix: Tensor | None = None
    smooth: Tensor | None = None
    hadamard: int = 0
    down: Tensor | None = None
    up: Tensor | None = None
    shift: Tensor | None = None
    qweight: QTensor | None = None
    clip: Tensor | float = 1.0
    edges: Tensor | None = None
    center: Tensor | None = None
    steps: Tensor | None = None
    ratio: Tensor | None = None
    fixes: Tensor | None = None
    dither: Tensor | None = None
    offsets: Tensor | None = None
    known: Tensor | None = None
    dtype: torch.dtype = torch.float16
    log: dict = field(default_factory=dict)

    @property
    def k_padded(self) -> int:
        """K rounded up to what the weight's and the activation's blocks and whole bytes need."""
        return formats.padded(self.weight.shape[1], self.spec.weight, self.spec.act, multiple=self.hadamard or 1)

    @property
    def act(self) -> str:
        return self.spec.act or ""

    def target(self) -> Tensor:
        """(N, Kp) float32: what is to be rounded, padded with zero columns."""
        w = self.weight if self.up is None else self.weight - self.up @ self.down
        if self.smooth is not None:
            w = w * self.smooth
        if self.k_padded > w.shape[1]:
            w = torch.nn.functional.pad(w, (0, self.k_padded - w.shape[1]))
        return reference.hadamard_blocks(w, self.hadamard) if self.hadamard else w

    def inputs(self, x: Tensor, quantized: bool = True, bins: Tensor | None = None) -> Tensor:
        """Rows x (M, K) as the quantized weight sees them, (M, Kp) float32; `quantized=False` leaves out rounding. bins: of the rows."""
        xh = reference.transform_act(x, self.k_padded, self.smooth, self.shift, self.hadamard)
        if not (quantized and self.act):
            return xh
        if self.steps is None:
            return reference.fake_act(xh, self.act)
        step = self.steps[-1:] if bins is None else self.steps[bins]  # (M,) or (1,)
        return reference.fake_act(xh, self.act, step[:, None] * self.ratio)

    def moved(self, x: Tensor, bins: Tensor | None) -> Tensor:
        """Rows x (M, K), centred where the draft is, with what `dither` adds to those of each bin."""
        return x if self.dither is None or bins is None else x + self.offsets[bins, None] * self.dither

    def rounded(self) -> "Draft":
        """Itself with the target rounded to nearest, if no method has rounded it yet."""
        if self.qweight is not None:
            return self
        return replace(self, qweight=formats.get(self.spec.weight).quantize(self.target(), self.clip))

    def values(self) -> Tensor:
        """(N, Kp) float32: what the rounded target stands for, by the nearest codes if no method has rounded it yet."""
        if self.qweight is not None:
            return self.qweight.dequantize()
        return formats.get(self.spec.weight).fake(self.target(), self.clip)

    def output(self, x: Tensor) -> Tensor:
        """Output (M, N) float32 of the finished layer on rows x (M, K): exactly the reference kernel's arithmetic; no row is known."""
        y = self.inputs(x) @ self.rounded().qweight.dequantize().T
        if self.up is not None:
            y = y + (x.float() @ self.down.T) @ self.up.T
        bias = self.folded_bias()
        return y if bias is None else y + bias

    def error(self, x: Tensor) -> float:
        """Squared error of the output on rows x, relative to the float output's energy (without bias)."""
        want = x.float() @ self.weight.T
        got = self.output(x) if self.bias is None else self.output(x) - self.bias
        return float((got - want).square().sum() / want.square().sum().clamp_min(1e-30))

    def lost(self, x: Tensor, bins: Tensor | None = None) -> Tensor:
        """What rounding does to the output (M, N) of rows x (M, K), before any bias makes up for it. bins: of the rows."""
        error = self.inputs(x, bins=bins) @ self.values().T - x @ self.weight.T
        return error if self.up is None else error.add_((x @ self.down.T) @ self.up.T)

    def offset(self) -> Tensor | None:
        """(N,) what is added to the float layer's bias: its correction, and the constant −Ŵ ((shift / smooth) H) that undoes `shift`."""
        if self.shift is None:
            return self.bias_fix
        rows = torch.zeros(1, self.weight.shape[1], device=self.weight.device)
        shifted = reference.transform_act(rows, self.k_padded, self.smooth, self.shift, self.hadamard)
        undo = -(shifted @ self.rounded().qweight.dequantize().T)[0]
        return undo if self.bias_fix is None else undo + self.bias_fix

    def folded_bias(self) -> Tensor | None:
        """Bias (N,) of the finished layer, or None."""
        parts = [part for part in (self.bias, self.offset()) if part is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def tables(self, rows: slice, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Timed slots of the finished layer's outputs `rows`, as `qgen.nn.clock` reads them, and its static activation scales."""
        if self._still():
            center, steps, fixes = _one(self.center), _one(self.steps), _one(self.fixes)
            return replace(self, edges=None, center=center, steps=steps, fixes=fixes).tables(rows, dtype)
        found: dict[str, Tensor | None] = {}
        if self.steps is not None:
            one = len(self.steps) == 1
            found = {
                "act_scale": self.ratio * self.steps if one else self.ratio,
                "t_scale": None if one else self.steps,
            }
        shift = self.center
        if self.dither is not None:
            shift = (0.0 if shift is None else shift) + self.offsets[:, None] * self.dither
        if shift is not None or self.fixes is not None or found.get("t_scale") is not None:
            found |= self._along(shift, rows, dtype)
        timed = any(found.get(name) is not None for name in ("t_shift", "t_scale", "t_bias"))
        found["t_edges"] = self.edges if timed else None
        return found

    def _still(self) -> bool:
        """Whether there are bins of timesteps, and nothing that differs between them."""
        tables = [t for t in (self.center, self.steps, self.fixes) if t is not None]
        return self.edges is not None and self.dither is None and all(bool((t == t[-1:]).all()) for t in tables)

    def _along(self, shift: Tensor | None, rows: slice, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """t_shift and t_bias, as curves if that takes less memory. The bias is there under t_scale too: the op's own would be scaled."""
        bias = self.folded_bias()
        bias = self.weight.new_zeros(1, len(self.weight)) if bias is None else bias[None]
        bias = (bias if self.fixes is None else bias + self.fixes)[:, rows]
        count = 1 if self.edges is None else len(self.edges) + 2

        def bias_of(shift: Tensor | None) -> Tensor:
            return (bias if shift is None else bias - shift @ self.weight[rows].T).expand(count, -1)

        made = factored(shift, bias_of, self.dtype, dtype.itemsize) if count > 1 else None
        if made is not None:
            return {"t_mix": made.mix, "t_shift": made.shift, "t_bias": made.bias.to(dtype)}
        shift = None if shift is None else self.stored(shift)
        return {"t_shift": None if shift is None else shift.to(self.dtype), "t_bias": bias_of(shift).to(dtype)}

    def stored(self, t: Tensor) -> Tensor:
        """t after a trip through the storage dtype, float32: what the finished layer will really use."""
        top = torch.finfo(self.dtype).max
        return t.clamp(-top, top).to(self.dtype).float()

    def noted(self, **facts: Any) -> "Draft":
        """Itself with more facts in the log."""
        return replace(self, log={**self.log, **facts})


def _one(table: Tensor | None) -> Tensor | None:
    """The last row of a table, alone."""
    return None if table is None else table[-1:]
