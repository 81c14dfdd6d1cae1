"""Models that are not what a quantizer expects: each comes out right, or is refused in one line that names the layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qgen
from qgen.errors import NotQuantizable
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
