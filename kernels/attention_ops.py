r"""The op `torch.ops.qgen.attention`: low-bit softmax attention. Schema, checks, shape function, dispatch by name, gradient.

    out, lse = attention(q, k, v, mask, causal, scale, spec, smooth_k, smooth_q, kernel, hadamard=0)
    S = scale · q kᵀ (+ mask),  out = softmax(S) v,  lse = log Σ exp S

q (B, H, Lq, D); k, v (B, Hkv, Lk, D), H a multiple of Hkv; all of one dtype. out (B, H, Lq, D) in that dtype, laid out in memory as
(B, Lq, H, D); lse (B, H, Lq) float32, natural logarithm. Rows that see no key give out = 0 and lse = -inf.

mask: bool (True = attend) or float (added), broadcastable to (B, H, Lq, Lk), or None. causal: query i sees keys j ≤ i + Lk - Lq
(bottom-right). scale: > 0, None = 1 / √D. spec: which numbers the two products use, a key of `SPECS`. smooth_k subtracts the mean key,
which softmax does not see; smooth_q subtracts the mean query of every 128 and adds its exact product with the keys back to S.
hadamard: size of the block Hadamard transform that q and k go through before they are rounded, 0 = none: their product does not
change, and a channel that stands out is spread over its block.
What it all means, number for number, is `attention_reference.py`. Whether a call is long enough to gain is the caller's business.
"""

__all__ = ["HEAD_DIMS", "SPECS", "AttentionNeeds", "ask", "attention", "check", "default_spec"]

from dataclasses import dataclass

import torch
from torch import Tensor

from qgen.errors import unknown
from qgen.kernels import ops, registry, tuning
from qgen.kernels.registry import Ask, Needs

# Numbers of the products q kᵀ and P v.
SPECS = {
    "int8": ("int8", "fp16"),
    "int8_fp8": ("int8", "e4m3"),
    "fp4_fp8": ("e2m1", "e4m3"),
    "fp4": ("e2m1", "e2m1"),
}
HEAD_DIMS = (64, 96, 128)  # what the Triton kernels have tiles for

# The spec that the compute capability runs best: int8 where tensor cores have it, fp8 from 8.9. On 10.3 int8 products leave the tensor
# core's fast path. On 12.x int8 with fp8 has the higher bound of the two eight-bit choices, and is the more accurate one.
_DEFAULTS = (
    ((8, 0), (8, 7), "int8"),
    ((8, 9), (10, 1), "int8_fp8"),
    ((10, 3), (10, 3), "fp4_fp8"),
    ((11, 0), (12, 1), "int8_fp8"),
)
AMD = ("gfx942", "gfx1100", "gfx1201")  # Instinct MI300, Radeon RX 7900, RX 9070: int8 products with float16 P v


def default_spec(capability: tuple[int, int] | str | None) -> str | None:
    """The spec to start from on a GPU of this capability or architecture; None where attention should stay in 16 bits."""
    if isinstance(capability, str):
        return "int8" if capability in AMD else None
    for low, high, spec in _DEFAULTS:
        if capability is not None and low <= capability <= high:
            return spec
    return None


@dataclass(frozen=True)
class AttentionNeeds(Needs):
    """`Needs` of an attention kernel. `weights` and `acts` of an `Ask` are the numbers of q kᵀ and of P v.

    head_dims: those served, empty = any. absent: capabilities inside `capability` that are not served, with the reason.
    """

    head_dims: tuple[int, ...] = ()
    absent: tuple[tuple[tuple[int, int], str], ...] = ()

    def refusals(self, ask: Ask) -> list[str]:
        why = []
        if self.head_dims and ask.k not in self.head_dims:
            why.append(f"serves head_dim {'/'.join(map(str, self.head_dims))}, asked {ask.k}")
        why += [reason for capability, reason in self.absent if capability == ask.capability]
        return super().refusals(ask) + why


def ask(
    q: Tensor, spec: str, mask: Tensor | None = None, causal: bool = False, smooth_q: bool = False, hadamard: int = 0
) -> Ask:
    """What `registry.choose` needs to know about a call; K is the head dimension. ValueError for an unknown spec."""
    qk, pv = _numbers(spec)
    flags = {"mask": mask is not None, "causal": causal, "smooth_q": smooth_q, "hadamard": hadamard > 0}
    return Ask(
        op="attention",
        device=("hip" if torch.version.hip else "cuda") if q.is_cuda else q.device.type,
        weight=qk,
        act=pv,
        dtype=q.dtype,
        k=q.shape[-1],
        capability=tuning.capability_of(q.device),
        traits=frozenset(name for name, on in flags.items() if on),
    )


def check(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, spec: str, hadamard: int = 0
) -> None:
    """Raises ValueError, in one line, for anything the op itself does not mean."""
    _numbers(spec)
    if any(t.is_nested or t.dim() != 4 for t in (q, k, v)):
        shapes = " ".join("nested" if t.is_nested else str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(
            f"attention wants q, k, v as (B, H, L, D), found {shapes}; sequences of different lengths are not "
            "packed: pad them and pass a mask"
        )
    (b, h, lq, d), (bk, hk, lk, dk) = q.shape, k.shape
    if (bk, dk) != (b, d) or v.shape != k.shape or h % hk:
        raise ValueError(
            f"attention wants k and v of one shape (B, Hkv, Lk, D) with q's B and D and an Hkv that divides H, "
            f"found q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if lk < 1 or lq < 1:
        raise ValueError(f"attention wants at least one query and one key, found Lq={lq}, Lk={lk}")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise ValueError(f"attention wants q, k, v of one float dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if scale is not None and not scale > 0:
        raise ValueError(f"attention wants a scale above 0, found {scale}")
    if hadamard and (hadamard < 2 or hadamard & (hadamard - 1) or d % hadamard):
        raise ValueError(f"the Hadamard transform of q and k wants a power of two that divides D={d}, found {hadamard}")
    if mask is not None:
        _check_mask(mask, (b, h, lq, lk))


def _check_mask(mask: Tensor, full: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"a mask is bool (True = attend) or float (added to the logits), found {mask.dtype}")
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) > 4 or any(have not in (1, want) for have, want in zip(sizes, full, strict=True)):
        raise ValueError(f"a mask must broadcast to (B, H, Lq, Lk) = {tuple(full)}, found {tuple(mask.shape)}")


def _numbers(spec: str) -> tuple[str, str]:
    if spec not in SPECS:
        raise ValueError(unknown("attention spec", spec, SPECS))
    return SPECS[spec]


ops._library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, str spec, bool smooth_k, bool smooth_q, "
    "str kernel, int hadamard=0) -> (Tensor, Tensor)"
)
ops._library.define(
    "attention_grad(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale) "
    "-> (Tensor, Tensor, Tensor)"
)


def _attention(q, k, v, mask, causal, scale, spec, smooth_k, smooth_q, kernel, hadamard=0):
    check(q, k, v, mask, scale, spec, hadamard)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return registry.find("attention", kernel).run(q, k, v, mask, causal, scale, spec, smooth_k, smooth_q, hadamard)


def _attention_grad(dout, dlse, q, k, v, mask, causal, scale):
    from qgen.kernels import attention_reference

    return attention_reference.attention_grad(dout, dlse, q, k, v, mask, causal, scale)


ops._library.impl("attention", _attention, "CompositeExplicitAutograd")
ops._library.impl("attention_grad", _attention_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("qgen::attention")
def _(q, k, v, mask, causal, scale, spec, smooth_k, smooth_q, kernel, hadamard=0):
    check(q, k, v, mask, scale, spec, hadamard)
    b, h, lq, d = q.shape
    return q.new_empty((b, lq, h, d)).transpose(1, 2), q.new_empty((b, h, lq), dtype=torch.float32)


@torch.library.register_fake("qgen::attention_grad")
def _(dout, dlse, q, k, v, mask, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):
    q, k, v, mask, causal, scale, *_ = inputs
    ctx.save_for_backward(q, k, v, mask)
    ctx.rest = (causal, scale)


def _backward(ctx, dout, dlse):
    if ctx.needs_input_grad[3]:
        raise ValueError(
            "attention has no gradient for its mask; detach the mask, or use torch's scaled_dot_product_attention"
        )
    grads = torch.ops.qgen.attention_grad(dout, dlse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * 8)


torch.library.register_autograd("qgen::attention", _backward, setup_context=_setup)

attention = torch.ops.qgen.attention
