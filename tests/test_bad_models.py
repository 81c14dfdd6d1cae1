"""Models that are not what a quantizer expects: each comes out right, or is refused in one line that names the layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgen
from qgen.errors import BadData, NotQuantizable
from qgen.nn import QuantLinear
from qgen.nn.packed import Packed
from tests import tiny
from tests.coverage.check import sqnr


def quantize(model, *calls, recipe="rtn-w4a16"):
    return qgen.quantize(model, recipe, calibration=list(calls) or None, progress=False)


def packed(model):
    return {path for path, m in model.named_modules() if isinstance(m, Packed)}


class Stack(nn.Module):
    """Two linear layers and a way to run them that a test replaces."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.run = nn.Linear(64, 64), nn.Linear(64, 64), run
        self.requires_grad_(False)

    def forward(self, x):
        return self.run(self, x)


# -- packed by somebody else -------------------------------------------------------------------------------------------
def test_a_model_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny.plain()
    model[2] = bnb.nn.Linear4bit(96, 40)
    model[2].weight = bnb.nn.Params4bit(torch.zeros(1920, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotQuantizable, match=r"layer 2 holds torch\.uint8, packed by another library"):
        quantize(model, torch.randn(2, 64))


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_model_of_bitsandbytes_that_is_not_packed_yet(kind):
    """Its weights are floats until the model is moved or called; the class of the parameter tells."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny.plain()
    model[2] = getattr(bnb.nn, kind)(96, 40)
    with pytest.raises(NotQuantizable, match=r"layer 2 holds a bitsandbytes \w+, packed by another library"):
        quantize(model)


def test_a_tensor_that_only_looks_like_a_float_one():
    """What torchao leaves in `weight`: a subclass whose dtype is the float one."""

    class AffineQuantizedTensor(torch.Tensor):
        pass

    model = tiny.plain()
    model[0].weight = nn.Parameter(torch.randn(96, 64).as_subclass(AffineQuantizedTensor), requires_grad=False)
    with pytest.raises(NotQuantizable, match=r"layer 0 holds a .*AffineQuantizedTensor, packed by another library"):
        quantize(model, torch.randn(2, 64))


# -- weights and modules that several places use -----------------------------------------------------------------------
def test_tied_weights(tmp_path):
    """Two layers with one parameter: each is packed, both give the same, and the float embedding keeps its own."""
    model = Stack(lambda self, x: self.b(torch.relu(self.a(x))))
    model.b.weight = model.a.weight
    x = torch.randn(5, 64)
    want = model(x)
    quantize(model, x)
    assert packed(model) == {"a", "b"} and torch.equal(model.a.dequantize(), model.b.dequantize())
    assert sqnr(model(x), want) > 12
    qgen.save(model, tmp_path)
    assert torch.equal(qgen.load(tmp_path, into=Stack(model.run))(x), model(x))


def test_a_head_tied_to_the_embedding_leaves_the_embedding_alone():
    model = tiny.llama()
    table = model.model.embed_tokens.weight.clone()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize(model, tiny.ids_call())
    assert (
        torch.equal(model.model.embed_tokens.weight, table) and model.lm_head.weight is model.model.embed_tokens.weight
    )


def test_a_module_in_two_places(tmp_path):
    model = Stack(lambda self, x: self.b(torch.relu(self.a(x))))
    model.b = model.a
    x = torch.randn(5, 64)
    want = model(x)
    quantize(model, x)
    assert model.a is model.b and isinstance(model.a, QuantLinear) and sqnr(model(x), want) > 12


def test_a_weight_that_is_read_past_its_layer():
    """`F.linear(x, m.weight)`: a call shows that the layer never runs, and it stays float; without one the first use is refused."""
    model = Stack(lambda self, x: self.b(F.linear(x, self.a.weight, self.a.bias)))
    x = torch.randn(5, 64)
    want = model(x)
    quantize(model, x)
    assert packed(model) == {"b"} and sqnr(model(x), want) > 15
    blind = quantize(Stack(model.run))
    with pytest.raises(
        RuntimeError, match=r"weight of the quantized layer 'a' is read by linear\(\) .*recipe\.skip\(\"a\"\)"
    ):
        blind(x)


@pytest.mark.parametrize(
    "use", [lambda w, x: x @ w.T, lambda w, x: torch.einsum("mk,nk->mn", x, w), lambda w, x: w * 2, lambda w, x: x[:, :1] + w[:5]],
    ids=["matmul", "einsum", "times", "plus"],
)  # fmt: skip
def test_computing_with_a_packed_weight_is_refused(use):
    model = quantize(Stack(None))
    with pytest.raises(RuntimeError, match="weight of the quantized layer 'a' is read"):
        use(model.a.weight, torch.randn(5, 64))


@pytest.mark.parametrize("join", [torch.cat, torch.stack], ids=["cat", "stack"])
def test_joining_packed_weights_is_refused(join):
    """As diffusers' `fuse_qkv_projections` does, which would write the placeholders' zeros into a new layer."""
    model = quantize(Stack(None))
    with pytest.raises(RuntimeError, match="weight of the quantized layer 'a' is read by"):
        join([model.a.weight.data, model.b.weight.data])


@pytest.mark.parametrize("copied", ["clone", "detach", "double", "contiguous"])
def test_copies_of_a_packed_weight_are_no_values_either(copied):
    weight = getattr(quantize(Stack(None)).a.weight, copied)()
    assert weight.shape == (64, 64)
    with pytest.raises(RuntimeError, match="weight of the quantized layer 'a' is read by linear"):
        F.linear(torch.randn(5, 64).to(weight.dtype), weight)


# -- layers of a class of their own ------------------------------------------------------------------------------------
class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Written(nn.Linear):
    """The same sums in other words, as transformers' FalconLinear has them."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("calls", [True, False], ids=["with calls", "by definition"])
@pytest.mark.parametrize("odd", [Doubled, Several, Causal], ids=lambda c: c.__name__)
def test_a_layer_that_computes_something_else_stays_float_and_is_listed(odd, calls):
    first = (lambda self, x: self.a(x.mT).mT) if odd is Causal else (lambda self, x: self.a(x))
    model = Stack(lambda self, x: self.b(first(self, x)[0] if odd is Several else first(self, x)))
    model.a = (odd(64, 64, 3) if odd is Causal else odd(64, 64)).requires_grad_(False)
    x = torch.randn(2, 7, 64)
    want = model(x)
    quantize(model, *[x] * calls)
    assert packed(model) == {"b"} and sqnr(model(x), want) > 15
    (row,) = (row for row in model.qgen_report if row["path"] == "a")
    assert row["spec"] == "float" and row["why"] == f"{odd.__name__} computes something else than its base class does"


def test_a_layer_that_says_the_same_in_other_words_is_packed():
    model = Stack(lambda self, x: self.b(self.a(x)))
    model.a = Written(64, 64).requires_grad_(False)
    quantize(model)
    assert packed(model) == {"a", "b"}


def test_a_replaced_forward_counts_as_one_of_its_own():
    model = Stack(lambda self, x: self.b(self.a(x)))
    model.a.forward = lambda x: x
    quantize(model)
    assert packed(model) == {"b"}


@pytest.mark.parametrize("calls", [True, False], ids=["with calls", "by definition"])
def test_hooks_of_a_layer_stay(calls, tmp_path):
    """And the handle that the user holds takes them off."""
    model = Stack(lambda self, x: self.b(torch.relu(self.a(x))))
    x = torch.randn(5, 64)
    handle = model.a.register_forward_hook(lambda layer, args, out: 3 * out)
    want = model(x)
    quantize(model, *[x] * calls)
    assert packed(model) == {"a", "b"} and sqnr(model(x), want) > 12
    qgen.save(model, tmp_path)
    other = Stack(model.run)
    other.a.register_forward_hook(lambda layer, args, out: 3 * out)
    assert torch.equal(qgen.load(tmp_path, into=other)(x), model(x))
    handle.remove()
    assert not torch.equal(model(x), qgen.load(tmp_path, into=Stack(None)).b(x)) and not model.a._forward_hooks


def test_hooks_that_compute_a_weight_have_done_their_work():
    model = Stack(lambda self, x: self.b(self.a(x)))
    model.a = nn.utils.spectral_norm(model.a)
    x = torch.randn(5, 64)
    model.eval()
    want = model(x)
    quantize(model, x)
    assert packed(model) == {"a", "b"} and sqnr(model(x), want.detach()) > 12


def test_a_float64_model(tmp_path):
    """Packed layers hold float32, what stays float is float64, and so is the output."""
    model = Stack(lambda self, x: self.b(torch.relu(self.a(x)))).double()
    x = torch.randn(5, 64).double()
    want = model(x)
    quantize(model, x)
    got = model(x)
    assert got.dtype == torch.float64 and model.a.bias.dtype == torch.float32 and sqnr(got, want) > 12
    qgen.save(model, tmp_path)
    assert torch.equal(qgen.load(tmp_path, into=Stack(model.run).double())(x), got)
    assert torch.equal(model.double()(x), got)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_an_offloaded_model_is_refused(kind):
    """New layers would not be among those that the hooks move."""
    pytest.importorskip("diffusers", reason="the hooks are diffusers'")
    model = tiny.flux()
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    with pytest.raises(
        NotQuantizable, match="offloaded by group: quantize it first, and call enable_group_offload then"
    ):
        quantize(model)


def test_a_model_offloaded_by_accelerate_is_refused():
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model = accelerate.cpu_offload(tiny.plain(), torch.device("cpu"))
    with pytest.raises(BadData, match=r"parameter 0\.weight is offloaded by accelerate: .*quantize the model before"):
        quantize(model)


def test_a_layer_called_by_keyword():
    model = Stack(lambda self, x: self.b(input=self.a(input=x)))
    x = torch.randn(5, 64)
    want = model(x)
    qgen.quantize(model, "w4a16", calibration=[x, torch.randn(7, 64)], progress=False)
    assert packed(model) == {"a", "b"} and sqnr(model(x), want) > 12


def test_complex_weights_stay():
    model = Stack(lambda self, x: self.b(self.a(x.to(torch.complex64)).real))
    model.a = nn.Linear(64, 64, dtype=torch.complex64).requires_grad_(False)
    x = torch.randn(5, 64)
    want = model(x)
    quantize(model, x)
    assert packed(model) == {"b"} and sqnr(model(x), want) > 15


def test_experts_in_one_parameter_are_packed():
    transformers = pytest.importorskip("transformers", reason="the experts are transformers'")
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=2,
    )
    model = quantize(transformers.MixtralForCausalLM(config).eval(), tiny.ids_call())
    paths = [f"model.layers.0.mlp.experts.{name}.{i}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    assert set(paths) <= packed(model) and not any(r["kind"] == "stack" for r in model.qgen_report)


# -- inputs of odd sizes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["rtn-w4a16", "rtn-int4", "rtn-nvfp4"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 24, 64), (64,)], ids=str)
def test_no_tokens_and_no_samples(shape, recipe):
    float_model = tiny.plain()
    want = float_model(torch.zeros(shape)).shape
    got = quantize(tiny.plain(), tiny.plain_call(), recipe=recipe)(torch.zeros(shape))
    assert got.shape == want and torch.isfinite(got).all()


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_one_sample_without_its_axis(conv):
    """As torch allows, while it calibrates and afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(32, 64, 3, padding=1), nn.GELU(), conv(64, 32, 3, padding=1)).requires_grad_(False)
    x = [torch.randn(32, *[5] * int(conv.__name__[4])) for _ in range(3)]
    want = model(x[0])
    qgen.quantize(model, "w8a8", calibration=x, progress=False)
    got = model(x[0])
    assert packed(model) == {"0", "2"} and got.shape == want.shape and sqnr(got, want) > 30
    torch.testing.assert_close(model(x[0][None])[0], got)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_every_dimension(conv, tmp_path):
    """Strides, dilation, padding, no sample, and a picture of one row: the packed layer is the float one with its values."""
    dims = int(conv.__name__[4])

    def make():
        layers = conv(32, 64, 3, stride=2, padding=2, dilation=2, bias=False), conv(64, 32, 1)
        return nn.Sequential(*layers).requires_grad_(False)

    model = quantize(make(), torch.randn(1, 32, *[7] * dims))
    assert packed(model) == {"0", "1"}
    twin = make()
    for layer, from_ in zip(twin, model, strict=True):
        layer.weight.copy_(from_.dequantize())
        if layer.bias is not None:
            layer.bias.copy_(from_.bias)
    for size in ([7] * dims, [1] * (dims - 1) + [4000 // 4**dims], [5] * dims):
        x = torch.randn(2, 32, *size)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-4, atol=1e-4)
    assert model(torch.randn(0, 32, *[7] * dims)).shape == twin(torch.randn(0, 32, *[7] * dims)).shape
    qgen.save(model, tmp_path)
    assert torch.equal(qgen.load(tmp_path, into=make())(x), model(x))


def test_a_gpt2_stores_its_weights_the_other_way_round(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the layers are transformers'")
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    want = model(input_ids=torch.arange(9)[None]).logits
    quantize(model, {"input_ids": torch.arange(9)[None]})
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, QuantLinear) and sqnr(layer.dequantize().double(), weight.T.double()) > 18
    got = model(input_ids=torch.arange(9)[None]).logits
    assert sqnr(got.double(), want.double()) > 12
    qgen.save(model, tmp_path)
    assert torch.equal(qgen.load(tmp_path)(input_ids=torch.arange(9)[None]).logits, got)


@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 64), nn.Conv1d(64, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv3d(64, 64, 3)], ids=str
)
@pytest.mark.parametrize("recipe", ["rtn-w4a16", "rtn-int4"])
def test_writing_to_an_output_where_gradients_are_wanted(layer, recipe):
    """`nn.ReLU(inplace=True)` after a layer, in training a LoRA, or without `no_grad`: the gradient is that of the same without writing."""
    x = torch.randn(2, 64, *[5] * (layer.weight.ndim - 2))
    grads = []
    model = quantize(nn.Sequential(layer).requires_grad_(False), recipe=recipe)
    for inplace in (True, False):
        given = x.clone().requires_grad_()
        y = F.relu(model(given * 1.0), inplace=inplace)
        y.square().sum().backward()
        grads.append((y.detach(), given.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and grads[0][1].abs().sum() > 0
