"""QuantLinear: y = Q((x / smooth) H) W₄ᵀ + (x downᵀ) upᵀ + bias, one op in the graph."""

__all__ = ["QuantLinear"]

import torch
from torch import Tensor, nn

from qgen.nn import mlp
from qgen.nn.packed import Layout, Packed, counts_of
from qgen.site import Draft


class QuantLinear(Packed, nn.Linear):
    """A packed linear layer, for `nn.Linear(K, N)`: x (…, K) to (…, N) in x's dtype.

    `isinstance(layer, nn.Linear)` holds, as LoRA loaders require; `layer.weight` is a placeholder, `dequantize()` gives values.
    """

    def __init__(self, k: int, n: int, layout: Layout, dtype: torch.dtype, device: str = "meta"):
        """An empty layer to be filled by a loader. k, n: in and out features; dtype: of the float slots."""
        self._setup(n, k, layout.weight, layout.act, layout.hadamard, dtype)
        self.in_features, self.out_features = k, n
        self.fill(layout.empty(n, k, dtype, device))

    @classmethod
    def from_draft(cls, draft: Draft, index: int = 0, dtype: torch.dtype = torch.bfloat16) -> "QuantLinear":
        """The layer of the draft's site number `index`; rounds to nearest what no method has rounded."""
        slots = slots_of(draft, index, dtype)
        layout = Layout(
            draft.spec.weight,
            draft.act,
            0 if draft.down is None else draft.down.shape[0],
            draft.hadamard,
            tuple(slots),
            **counts_of(slots),
        )
        layer = cls(draft.weight.shape[1], draft.sites[index].shape[0], layout, dtype)
        layer.fill(slots)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, mlp.Pending):
            return mlp.joined(self, input)
        if self.defers and mlp.deferred(self, input):
            return mlp.Pending(input, self)
        return self._run(input)


def slots_of(draft: Draft, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical tensors of one site of a draft: its rows of what is stacked along N, its own copy of what is shared."""
    draft = draft.rounded()
    start = sum(site.shape[0] for site in draft.sites[:index])
    rows = slice(start, start + draft.sites[index].shape[0])
    q, bias = draft.qweight.rows(rows), draft.folded_bias()
    slots = {
        "codes": q.codes,
        "scales": q.scales,
        "global_scale": q.global_scale,
        "zero": q.zero,
        "smooth": None if draft.smooth is None else draft.smooth.to(draft.dtype),
        "down": None if draft.down is None else draft.down.to(draft.dtype),
        "up": None if draft.up is None else draft.up[rows].to(draft.dtype),
        "bias": None if bias is None else bias[rows].to(dtype),
        "shift": None if draft.shift is None else draft.shift.to(dtype),
    }
    slots |= draft.tables(rows, dtype)
    if slots.get("t_bias") is not None:
        one = slots["t_shift"] is None if "t_shift" in slots else len(slots["t_bias"]) == 1
        slots["bias"] = slots.pop("t_bias")[0] if one and slots.get("t_edges") is None else None  # it is in the table
    if draft.known is not None:
        given = None if draft.bias is None else draft.bias[rows]
        slots["known_x"] = draft.known.to(dtype)
        slots["known_y"] = nn.functional.linear(draft.known, draft.weight[rows], given).to(dtype)
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in slots.items() if t is not None}
