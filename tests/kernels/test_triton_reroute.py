"""Attention that a model's owner was rerouted to runs in Triton: which kernel, at which timestep, with which numbers."""

import interpreter
import pytest
import torch
import torch.nn.functional as F

interpreter.needed()

from torch import nn

from qgen.kernels import attention_choice, attention_ops
from qgen.nn.attention import Choices, install, remove


class Attend(nn.Module):
    """One call of torch's attention: 4 heads of 64 on 2 of keys."""

    def forward(self, q, k, v, timestep, mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.fixture(autouse=True)
def on_cpu():
    """Triton's kernels serve the CPU; which one serves a call is remembered, so that memory is emptied around the test."""
    attention_choice._kernel.cache_clear()
    with interpreter.on_cpu():
        yield
    attention_choice._kernel.cache_clear()


def inputs(length=70):
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, 64).bfloat16() for heads in (4, 2, 2)]


def called(model, *args, **kwargs):
    with interpreter.launches() as launched:
        out = model(*args, **kwargs)
    return out, "_attend" in launched


@pytest.mark.parametrize("spec", attention_ops.SPECS)
def test_the_timestep_chooses_triton_or_torch(spec):
    q, k, v = inputs()
    model = Attend()
    install(model, Choices({"": (spec, "")}, (500.0,), "timestep"))
    early, by_triton = called(model, q, k, v, torch.tensor([400.0]))
    late, by_triton_late = called(model, q, k, v, torch.tensor([600.0]))
    remove(model)
    stock, untouched = called(model, q, k, v, torch.tensor([400.0]))
    assert (by_triton, by_triton_late, untouched) == (True, False, False)
    smooth = attention_choice.smooths_q(spec)
    name = f"triton_{spec}"
    assert torch.equal(early, attention_ops.attention(q, k, v, None, False, None, spec, True, smooth, name)[0])
    want = attention_ops.attention(q, k, v, None, False, None, spec, True, smooth, "reference")[0]
    assert (early - want).norm() < 6e-3 * want.norm() and torch.equal(late, stock) and not torch.equal(early, stock)


def test_masks_that_a_kernel_refuses_are_torchs():
    q, k, v = inputs()
    mask = torch.rand(70, 70) > 0.2
    model = Attend()
    stock = model(q, k, v, None, mask)
    for spec, served in (("int8", True), ("fp4_fp8", False)):
        install(model, Choices({"": (spec,)}))
        with pytest.MonkeyPatch.context() as patch:  # as on a GPU: there the reference is no way out
            patch.setattr(attention_choice, "kernel_for", _on_a_gpu)
            out, by_triton = called(model, q, k, v, None, mask)
        assert by_triton is served
        assert torch.equal(out, stock) is not served and (out - stock).norm() < 3e-2 * stock.norm()
        remove(model)


def _on_a_gpu(q, spec, mask, causal):
    name = attention_choice._kernel(attention_ops.ask(q, spec, mask, causal, attention_choice.smooths_q(spec)))
    return None if name == "reference" else name
