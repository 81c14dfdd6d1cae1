r"""What a kernel of a linear layer can do besides: the norm or activation before it, the activation or q/k preparation behind.

    y = heads(activation(linear(produce(x))))

    produce     layernorm   ((x − mean) / σ · γ + β) · (1 + scale_b) + shift_b          b = row // rows per image (adaLN)
                rmsnorm     (x / rms · γ) · (1 + scale_b) + shift_b
                gelu_tanh, silu, silu_mul = silu(x) · gate; rounded once to the dtype of x
    activation  none, gelu_tanh or silu, of the float32 accumulator
    heads       RMSNorm of each head of the leading columns (queries and keys), then rotary positions

Frozen records of tensors and numbers; they know no Triton and no module.
RMSNorm of q and k: Henry et al., 2020, https://arxiv.org/abs/2010.04245; rotary positions: https://arxiv.org/abs/2104.09864
"""

__all__ = ["ACTIVATIONS", "GATED", "KINDS", "Heads", "Producer"]

from dataclasses import dataclass

from torch import Tensor

KINDS = ("none", "layernorm", "rmsnorm", "gelu_tanh", "silu", "silu_mul")
ACTIVATIONS = ("none", "gelu_tanh", "silu")
GATED = "silu_mul"  # of an MLP whose first layer gives [gate | value]


@dataclass(frozen=True)
class Producer:
    """A producer and its tensors, all optional but for `gate` of "silu_mul".

    kind: one of KINDS. gamma, beta: (K,). scale, shift: (B, K), contiguous, row b modulating rows b · M / B … of x.
    gate: (M, K), last axis contiguous. eps: of the norms. ValueError for an unknown kind or a gate out of place.
    """

    kind: str = "none"
    gamma: Tensor | None = None
    beta: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    gate: Tensor | None = None
    eps: float = 1e-6

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"producers are {', '.join(KINDS)}, found {self.kind!r}")
        if (self.kind == "silu_mul") != (self.gate is not None):
            raise ValueError(f"a gate goes with the producer 'silu_mul' and no other, found {self.kind!r}")


@dataclass(frozen=True)
class Heads:
    """Of the leading `columns` outputs, heads of `dim`: RMSNorm and rotation; the columns behind (values) stay.

    gamma: (columns,), the norm's weight for each column, or None = no norm. cos, sin: (L, dim / 2) float32, row m of y
    is at position m % L, or None = no rotation. halves: whether element j turns with j + dim / 2 (Llama), else 2j with
    2j + 1. ValueError if columns are no whole heads, or only one of cos and sin is there.
    """

    dim: int
    columns: int
    gamma: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    halves: bool = False
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2 or self.columns % self.dim:
            raise ValueError(
                f"expected whole heads of an even size, found {self.columns} columns in heads of {self.dim}"
            )
        if (self.cos is None) != (self.sin is None):
            raise ValueError("a rotation needs both cos and sin")
