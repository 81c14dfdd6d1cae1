r"""The op `torch.ops.qgen.attention_choice`: attention whose numbers are looked up when it runs.

    out = attention_choice(q, k, v, mask, causal, scale, where, table, specs)

Which of `specs` serves a call depends on the layer (`table`, one entry for each range of timesteps) and on where sampling is (`where`).
Both are tensors, so that one compiled graph serves every layer and every step. `specs` is text, names of `attention_ops.SPECS` with commas
between them; an empty name is torch's own attention in the dtype given, and so is what no kernel of the device serves.
q (B, H, Lq, D); k, v (B, Hkv, Lk, D); out (B, H, Lq, D), in memory (B, Lq, H, D). causal wants Lq = Lk.
"""

__all__ = ["attention_choice", "kernel_for", "smooths_q"]

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qgen.errors import NoKernel
from qgen.kernels import attention_ops, attention_reference, ops, registry  # noqa: F401 (the reference registers itself)

ops._library.define(
    "attention_choice(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float? scale, Tensor where, Tensor table, str specs) "
    "-> Tensor"
)


def kernel_for(q: Tensor, spec: str, mask: Tensor | None, causal: bool) -> str | None:
    """The kernel for a call, or None. The reference is for the CPU; on a GPU it would be far slower than 16-bit attention."""
    return _kernel(attention_ops.ask(q, spec, mask, causal, smooths_q(spec)))


def smooths_q(spec: str) -> bool:
    """Whether the mean query is taken out as well: four bits are too few for a common offset, eight are not."""
    return attention_ops.SPECS[spec][0] == "e2m1"


@functools.lru_cache(maxsize=256)
def _kernel(ask: registry.Ask) -> str | None:
    try:
        name = registry.choose(ask).name
    except NoKernel:
        return None
    return None if name == "reference" and ask.device != "cpu" else name


def _float(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:  # with both, torch knows only an attention that holds all probabilities
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _choice(q, k, v, mask, causal, scale, where, table, specs):
    spec = specs.split(",")[int(table[int(where)])]
    name = kernel_for(q, spec, mask, causal) if spec else None
    if name is None:
        return _float(q, k, v, mask, causal, scale)
    return torch.ops.qgen.attention(q, k, v, mask, causal, scale, spec, True, smooths_q(spec), name)[0]


ops._library.impl("attention_choice", _choice, "CompositeExplicitAutograd")


@torch.library.register_fake("qgen::attention_choice")
def _(q, k, v, mask, causal, scale, where, table, specs):
    b, h, lq, d = q.shape
    return q.new_empty((b, lq, h, d)).transpose(1, 2)


def _setup(ctx, inputs, output):
    q, k, v, mask, causal, scale, *_ = inputs
    ctx.save_for_backward(q, k, v, mask)
    ctx.rest = (causal, scale)


def _backward(ctx, dout):
    if ctx.needs_input_grad[3]:
        raise ValueError("attention has no gradient for its mask; detach the mask, or quantize without attention")
    q = ctx.saved_tensors[0]
    dlse = q.new_zeros(q.shape[:3], dtype=torch.float32)
    grads = torch.ops.qgen.attention_grad(dout, dlse, *ctx.saved_tensors, *ctx.rest)
    return (*grads, *[None] * 6)


torch.library.register_autograd("qgen::attention_choice", _backward, setup_context=_setup)

attention_choice = torch.ops.qgen.attention_choice
