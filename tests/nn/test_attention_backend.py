"""qgen's attention as a backend of diffusers' dispatcher: by name, for one model, and undone without a trace."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import qgen  # noqa: F401 (registers the backends once diffusers is imported)
from qgen.kernels.attention_ops import SPECS
from qgen.nn.attention import Choices, install, remove
from qgen.nn.attention_backend import backend_name
from tests.tiny import FAMILIES, first

OWNERS = {
    "flux": ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"),
    "wan": tuple(f"blocks.{i}.attn{j}" for i in range(2) for j in (1, 2)),
}


def dispatch(q, k, v, name, **options):
    """(B, H, L, D) in and out, though the dispatcher has heads third."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    given = (x.transpose(1, 2) for x in (q, k, v))
    return dispatch_attention_fn(*given, backend=AttentionBackendName(name), **options).transpose(1, 2)


def heads(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", OWNERS)
def test_a_model_runs_what_quantize_would_install_and_is_restored(family, spec):
    make, call = FAMILIES[family]
    model, other, given = make(), make(), call(3)
    want = first(given.run(model))
    install(model, Choices(dict.fromkeys(OWNERS[family], (spec,))))
    expected = first(given.run(model))
    remove(model)
    model.set_attention_backend(backend_name(spec))
    got = first(given.run(model))
    assert torch.equal(got, expected) and not torch.equal(got, want)
    assert torch.equal(first(given.run(other)), want)  # diffusers' own backends would have switched this one, too
    model.reset_attention_backend()
    assert torch.equal(first(given.run(model)), want)


def test_other_backends_stay_as_diffusers_has_them_and_unknown_names_are_its_error():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    model = FAMILIES["flux"][0]()
    before = _AttentionBackendRegistry._active_backend
    try:
        model.set_attention_backend("_native_math")
        assert _AttentionBackendRegistry._active_backend == AttentionBackendName._NATIVE_MATH
    finally:
        _AttentionBackendRegistry.set_active_backend(before)
    with pytest.raises(ValueError, match=r"must be one of the following.*qgen_int8"):
        model.set_attention_backend("qgen_int7")
    assert AttentionBackendName("qgen_fp4") is AttentionBackendName.QGEN_FP4 is AttentionBackendName["QGEN_FP4"]


def test_within_a_context_it_serves_whoever_has_no_backend_of_its_own():
    from diffusers import attention_backend

    make, call = FAMILIES["flux"]
    model, given = make(), call(0)
    want = first(given.run(model))
    with attention_backend("qgen_fp4"):
        assert not torch.equal(first(given.run(model)), want)
    assert torch.equal(first(given.run(model)), want)


def test_a_model_that_asks_no_dispatcher_is_refused():
    model = FAMILIES["unet"][0]()
    with pytest.raises(ValueError, match=r"UNet2DConditionModel does not go through.*attention='int8'"):
        model.set_attention_backend("qgen_int8")


def error(got, want):
    return float((got - want).norm() / want.norm())


def test_masks_grouped_heads_causal_and_cross_attention():
    q, k, v = (heads(2, 4, 40, 32, seed=i) for i in range(3))
    hide = torch.ones(2, 40, dtype=torch.bool)
    hide[:, 30:] = False
    v[:, :, 30:] *= 20
    want = F.scaled_dot_product_attention(q, k, v, hide[:, None, None])
    assert error(F.scaled_dot_product_attention(q, k, v), want) > 0.3
    added = torch.zeros(2, 1, 40, 40).masked_fill(~hide[:, None, None], -torch.inf)
    for mask in (hide, hide[:, None, None], added):  # (B, Lk) counts for all heads and queries
        assert 0 < error(dispatch(q, k, v, "qgen_int8", attn_mask=mask), want) < 0.02
    few = k[:, :2], v[:, :2]
    want = F.scaled_dot_product_attention(q, *few, enable_gqa=True)
    assert 0 < error(dispatch(q, *few, "qgen_int8", enable_gqa=True), want) < 0.02
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert 0 < error(dispatch(q, k, v, "qgen_int8", is_causal=True), want) < 0.02
    want = F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7], scale=0.3)
    assert 0 < error(dispatch(q, k[:, :, :7], v[:, :, :7], "qgen_int8", scale=0.3), want) < 0.02


def test_what_is_not_served_goes_to_torch_bit_for_bit():
    q, k, v = (heads(1, 2, 9, 32, seed=i) for i in range(3))
    for one, other, more in ((q[:, :, :1], k, {}), (q.double(), k.double(), {}), (q[:, :, :5], k, {"is_causal": True})):
        value = v.to(other.dtype)
        want = F.scaled_dot_product_attention(one, other, value, **more)
        assert torch.equal(dispatch(one, other, value, "qgen_int8", **more), want)
    for more in ({"attention_kwargs": {"return_lse": True}}, {"parallel_config": object()}):
        with pytest.raises(ValueError, match="qgen_int8 has no"):
            dispatch(q, k, v, "qgen_int8", **more)


def test_one_graph_serves_a_model():
    make, call = FAMILIES["wan"]
    model, given = make(), call(0)
    model.set_attention_backend("qgen_int8")
    want = first(given.run(model))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(first(given.run(compiled)), want)


@pytest.mark.slow  # two fresh interpreters import diffusers
@pytest.mark.parametrize("first_import", ["qgen", "diffusers"])
def test_the_order_of_imports_does_not_matter(first_import):
    model = "from diffusers.models.modeling_utils import ModelMixin"
    order = ("import qgen", model) if first_import == "qgen" else (model, "import qgen")
    listed = "from diffusers.models.attention_dispatch import AttentionBackendName as N; assert N('qgen_int8').value == 'qgen_int8'"
    subprocess.run([sys.executable, "-c", "; ".join((*order, listed))], check=True, timeout=120)
