"""Packed layers: the reference's arithmetic, canonical bytes in state_dict, casts and moves that change no number."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgen import formats
from qgen.kernels import fused_ops, registry
from qgen.kernels.ops import SLOTS
from qgen.nn import QuantConv2d, QuantLinear
from qgen.nn.packed import Layout
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K, R = 40, 100, 8
SPECS = [
    ("int4_g64", "uint4_g64"), ("int4_g64", ""), ("nvfp4", "nvfp4_dynamic"), ("mxfp4", "mxfp4"), ("int4_s8_g64", "int8_row"),
    ("uint4_g32", ""), ("int8_row", "int8_row"), ("fp8_e4m3_row", "fp8_e4m3_row"),
]  # fmt: skip
spec_ids = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(filter(None, s)))


def draft(spec=SPECS[0], n=N, k=K, full=True, kind="linear", sites=1, dtype=torch.float32, **changes):
    g = torch.Generator().manual_seed(2)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    where = tuple(Site(f"l{i}", kind, "", i, "x", (n, k)) for i in range(sites))
    d = Draft(where, Spec(spec[0], spec[1] or None), randn(n * sites, k), randn(n * sites), dtype=dtype)
    if full:
        d = replace(d, smooth=torch.rand(k, generator=g) + 0.5, down=randn(R, k) / 9, up=randn(n * sites, R) / 9)
        d = replace(d, **{name: d.stored(getattr(d, name)) for name in ("smooth", "down", "up")})
    return replace(d, **changes)


def linear(*args, dtype=torch.float32, **options):
    made = QuantLinear.from_draft(draft(*args, **options), dtype=dtype)
    made.prepare("reference")
    return made


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8)


def same(a, b):
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


# -- numbers -----------------------------------------------------------------------------------------------------------
@spec_ids
@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
def test_the_layer_computes_what_the_draft_promised(spec, full):
    d = draft(spec, full=full)
    x = torch.randn(3, 5, K)
    y = linear(spec, full=full)(x)
    assert torch.allclose(y.flatten(0, 1), d.output(x.flatten(0, 1)), atol=1e-4, rtol=1e-4) and y.shape == (3, 5, N)


@pytest.mark.parametrize("hadamard, shift", [(32, None), (0, 0.125), (64, 0.125)])
def test_rotation_and_shift(hadamard, shift):
    changes = {"hadamard": hadamard, "shift": None if shift is None else torch.tensor(shift)}
    spec = ("int4_g64", "int4_g64" if shift is None else "uint4p_g64")
    x = torch.randn(7, K).abs()
    assert torch.allclose(linear(spec, **changes)(x), draft(spec, **changes).output(x), atol=1e-4, rtol=1e-4)


def test_bias_correction_ends_up_in_the_bias():
    fix = torch.linspace(0, 1, N)
    assert torch.allclose(linear(bias_fix=fix).bias - linear().bias, fix, atol=1e-6)


def test_sites_of_one_draft_are_split_along_n():
    d = draft(sites=3)
    x = torch.randn(6, K)
    layers = [QuantLinear.from_draft(d, i, torch.float32) for i in range(3)]
    for layer in layers:
        layer.prepare("reference")
    assert torch.allclose(torch.cat([layer(x) for layer in layers], 1), d.output(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(layers[0].down, layers[2].down) and layers[0].down.data_ptr() != layers[2].down.data_ptr()


@spec_ids
def test_dequantize_gives_the_weight_that_the_layer_stands_for(spec):
    d = draft(spec).rounded()
    w = d.qweight.dequantize().double()[:, :K] / d.smooth.double() + d.up.double() @ d.down.double()
    assert torch.allclose(linear(spec).dequantize().double(), w, atol=1e-5)


@pytest.mark.parametrize("spec", [("int4_g64", ""), ("int4_g64", "int4_g64")], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [(3, 1, 1, 1), (1, 1, 0, 1), (1, 2, 0, 1), (3, 2, 1, 1), ((3, 1), 1, (1, 0), 1), (3, 1, 2, 2)],
)
def test_convolutions_equal_torch_with_the_dequantized_weight(spec, kernel, stride, padding, dilation):
    like = nn.Conv2d(12, N, kernel, stride, padding, dilation)
    k = like.weight[0].numel()
    d = draft(spec, k=k, kind="conv2d", bias=like.bias.detach())
    layer = QuantConv2d.from_draft(d, like, dtype=torch.float32)
    layer.prepare("reference")
    x = torch.randn(2, 12, 9, 11)
    want = F.conv2d(x, layer.dequantize(), like.bias, stride, padding, dilation)
    y = layer(x)
    assert y.shape == want.shape == like(x).shape
    if spec[1]:
        assert 10 < 10 * torch.log10(want.square().sum() / (want - y).square().sum()) < 60, (
            "activations are rounded, within reason"
        )
    else:
        assert torch.allclose(y, want, atol=1e-4)


@pytest.mark.parametrize("options", [{"groups": 4}, {"padding_mode": "circular"}, {"padding": "same"}])
def test_convolutions_that_cannot_be_packed_are_refused(options):
    like = nn.Conv2d(12, N, 3, **options)
    with pytest.raises(ValueError, match="only convolutions with one group and zero padding can be packed"):
        QuantConv2d(like, Layout("int4_g64"), torch.float32)


# -- what it looks like ------------------------------------------------------------------------------------------------
def test_it_is_a_linear_layer_to_others():
    layer = linear()
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (K, N)
    assert (
        layer.weight.shape == (N, K)
        and layer.weight.dtype == torch.float32
        and layer.weight.untyped_storage().nbytes() <= 4
    )
    assert not any(p.requires_grad for p in layer.parameters())
    assert "weight" not in dict(layer.named_parameters())


def test_the_first_parameter_has_the_compute_dtype():
    """Wan's time embedder, among others, casts its input to the dtype of its first parameter."""
    assert next(linear(dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1), lambda w: w.copy_(torch.ones(N, K)), lambda w: w.__setitem__(0, 1), lambda w: w.zero_(),
        lambda w: w.data.add_(1), lambda w: w.__iadd__(1),
    ],
)  # fmt: skip
def test_the_placeholder_cannot_be_written(write):
    with pytest.raises(RuntimeError, match="placeholder that cannot be written"):
        write(linear().weight)


@spec_ids
def test_records_of_two_layers_make_an_mlp(spec):
    first, second = linear(spec, n=128), linear(spec, n=N, k=128)
    x = torch.randn(3, 5, K)
    y = fused_ops.mlp(x, first.record(), second.record(), activation="gelu_tanh", kernel=first.kernel)
    assert torch.allclose(y, second(F.gelu(first(x), approximate="tanh")), atol=1e-4, rtol=1e-4)


def test_an_ask_carries_the_transform_and_the_kind_of_static_scales():
    layer = linear(hadamard=64)
    assert layer.ask().hadamard == 64 and layer.ask().static == "" and "hadamard" in layer.ask().traits
    for scales, kind in ((torch.ones(()), "tensor"), (torch.ones(2), "block")):
        layer.act_scale = nn.Parameter(scales, requires_grad=False)
        assert layer.ask().static == kind and "static_act" in layer.ask().traits


def test_without_a_kernel_it_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"has no kernel yet: call qgen\.prepare"):
        QuantLinear.from_draft(draft(), dtype=torch.float32)(torch.randn(1, K))


def test_repr_tells_formats_rank_and_kernel():
    assert repr(linear()) == f"QuantLinear(N={N}, K={K}, int4_g64 x uint4_g64, rank={R}, kernel=reference)"


# -- state -------------------------------------------------------------------------------------------------------------
@spec_ids
def test_state_dict_there_and_back(spec):
    layer, empty = linear(spec), QuantLinear(K, N, linear(spec).layout, torch.float32)
    state = {n: t for n, t in layer.state_dict().items() if n != "weight"}
    assert same(state, layer.canonical()) and set(state) <= set(SLOTS)
    empty.load_state_dict(state, assign=True)
    empty.prepare("reference")
    x = torch.randn(4, K)
    assert same(empty.canonical(), layer.canonical()) and torch.equal(empty(x), layer(x))


@spec_ids
def test_layout_foretells_shapes_and_dtypes(spec):
    """A loader builds an empty layer from a header: every slot must have the shape of the real one."""
    layer = linear(spec)
    empty = layer.layout.empty(N, K, torch.float32)
    assert list(empty) == list(layer.canonical())
    for slot, t in layer.canonical().items():
        assert empty[slot].shape == t.shape and (empty[slot].dtype == t.dtype or slot in ("smooth", "down", "up")), slot


def test_loading_wrong_shapes_or_slots_is_an_error():
    layer = linear()
    state = dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"codes: expected \(40, 64\), found \(40, 32\)"):
        layer.load_state_dict({**state, "codes": state["codes"][:, :32]})
    with pytest.raises(RuntimeError, match=r"Missing key.*down"):
        layer.load_state_dict({n: t for n, t in state.items() if n != "down"})
    bare = linear(full=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*down"):
        bare.load_state_dict(state)


def test_loading_another_meaning_is_an_error():
    a, b = nn.Sequential(linear(("int4_g64", ""))), nn.Sequential(linear(("int4_g64", "int8_row")))
    with pytest.raises(RuntimeError, match="this layer's act is int8_row, the state dict's float"):
        b.load_state_dict(a.state_dict())


def test_copies_are_independent_and_equal():
    layer = linear()
    twin = copy.deepcopy(layer)
    x = torch.randn(3, K)
    assert (
        torch.equal(twin(x), layer(x))
        and twin.codes.data_ptr() != layer.codes.data_ptr()
        and twin.kernel == "reference"
    )


@spec_ids
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_changes_the_bias_alone(spec, dtype):
    layer = linear(spec)
    before = {n: t.clone() for n, t in layer.canonical().items()}
    layer.to(dtype)
    after = layer.canonical()
    assert layer.bias.dtype == layer.compute_dtype == layer.weight.dtype == dtype and layer.kernel is not None
    assert same({n: t for n, t in before.items() if n != "bias"}, {n: t for n, t in after.items() if n != "bias"})
    assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype


def test_casts_to_eight_bits_are_passed_over():
    layer = linear()
    before = {n: t.clone() for n, t in layer.canonical().items()}
    layer.to(torch.float8_e4m3fn)
    assert same(before, layer.canonical()) and layer.compute_dtype == torch.float32


def test_to_meta_and_back_empty_keeps_shapes():
    layer = linear()
    empty = copy.deepcopy(layer).to("meta")
    assert empty.codes.device.type == "meta" and {n: t.shape for n, t in empty.canonical().items()} == {
        n: t.shape for n, t in layer.canonical().items()
    }
    empty.load_state_dict(layer.state_dict(), assign=True)
    empty.prepare("reference")
    x = torch.randn(3, K)
    assert torch.equal(empty(x), layer(x))


def test_nbytes_counts_every_slot():
    layer = linear(("int4_g64", ""))
    kp = formats.padded(K, "int4_g64")
    expected = N * kp // 2 + N * (kp // 64) * 2 + 4 * (K + R * K + N * R + N)
    assert layer.nbytes == expected


# -- kernels -----------------------------------------------------------------------------------------------------------
@spec_ids
def test_the_best_kernel_here_agrees_with_the_reference(spec):
    reference, best = linear(spec, n=64, k=128), linear(spec, n=64, k=128)
    x = torch.randn(33, 128)
    best.prepare()
    want, got = reference(x), best(x)
    assert (got - want).norm() <= 4e-3 * want.norm(), f"{best.kernel} against reference"


def test_preparing_again_packs_from_canonical_bytes():
    layer = linear(n=64, k=128)
    before = {n: t.clone() for n, t in layer.canonical().items()}
    for _ in range(2):
        layer.prepare()
        assert same(before, layer.canonical())
    with registry.use("reference"):
        assert layer.prepare() == "reference"


def test_the_ask_tells_what_is_in_use():
    ask = linear(("int4_g64", "uint4p_g64"), shift=torch.tensor(0.1), hadamard=32).ask()
    assert ask.traits == {"lowrank", "smooth", "shift", "bias", "hadamard"} and (ask.n, ask.k, ask.rank) == (N, K, R)
    assert ask.device == "cpu" and ask.dtype == torch.float32 and linear(full=False).ask().traits == {"bias"}
