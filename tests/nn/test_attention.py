"""Rerouted attention: who is caught, what goes through untouched, that nothing else changes, that files keep the choice."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgen
from qgen.calibration.base import Call, Moment
from qgen.errors import BadCheckpoint
from qgen.kernels.attention_reference import attention_float
from qgen.nn.attention import Choices, install, refusal, remove
from tests.tiny import FAMILIES, calls, first


class Attend(nn.Module):
    """q, k, v from one linear layer; the call of torch's attention takes what the test gives."""

    def __init__(self, heads=2, kv_heads=2, width=32, **options):
        super().__init__()
        self.heads, self.kv_heads, self.options = heads, kv_heads, options
        self.q, self.k, self.v = (nn.Linear(64, n * width) for n in (heads, kv_heads, kv_heads))

    def forward(self, x, mask=None, timestep=None):
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (f(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for f in (self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def attend(**options):
    torch.manual_seed(0)
    return Attend(**options).eval().requires_grad_(False)


def error(got, want):
    return float((got - want).detach().norm() / want.detach().norm())


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=32, text_embed_dim=32, num_layers=2,
        sample_width=8, sample_height=8, sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=6,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def cogvideox_call(seed=0):
    g = torch.Generator().manual_seed(seed)
    kwargs = {
        "hidden_states": torch.randn(1, 2, 4, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=g),
        "timestep": torch.tensor([500]),
    }
    return Call((), kwargs, Moment(seed))


MODELS = {name: FAMILIES[name] for name in ("flux", "unet", "sd3", "pixart", "sana", "wan", "llama", "t5")}
MODELS["cogvideox"] = (cogvideox, cogvideox_call)
OWNERS = {"flux": 2, "unet": 8, "sd3": 2, "pixart": 4, "sana": 2, "wan": 4, "llama": 2, "t5": 2, "cogvideox": 2}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_caught_and_given_back(name):
    make, call = MODELS[name]
    model, given = make(), call(7)
    want = first(given.run(model))
    recorded = [call(seed) for seed in range(2)]
    qgen.quantize(model, qgen.Recipe(qgen.Spec("fp8_e4m3_row")), calibration=recorded, progress=False)
    layers = first(given.run(model))
    again = make()
    qgen.quantize(again, qgen.Recipe(qgen.Spec("fp8_e4m3_row")), calibration=recorded, attention="int8", progress=False)
    got = first(given.run(again))
    assert len(again.qgen_attention.layers) == OWNERS[name]
    assert not torch.equal(got, layers) and error(got, want) < error(layers, want) + 0.05
    assert torch.equal(first(given.run(copy.deepcopy(again))), got)
    remove(again)
    assert torch.equal(first(given.run(again)), layers)
    assert not any("_qgen_attention" in m.__dict__ for m in again.modules())


@pytest.mark.parametrize("name", ["flux", "llama", "unet"])
def test_files_keep_the_choice(name, tmp_path):
    make, call = MODELS[name]
    model = make()
    qgen.quantize(model, "rtn-int4", calibration=calls(name), attention="int8", progress=False)
    qgen.save(model, tmp_path)
    loaded = qgen.load(tmp_path)
    assert loaded.qgen_attention == model.qgen_attention
    assert torch.equal(first(call(7).run(loaded)), first(call(7).run(model)))
    with_library = type(model).from_pretrained(tmp_path)
    assert torch.equal(first(call(7).run(with_library)), first(call(7).run(model)))


def test_a_file_that_names_a_module_that_is_not_there_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from qgen.io.header import _dumps, _sum

    model = nn.ModuleDict({"a": attend()})
    model.forward = model["a"].forward
    qgen.quantize(model["a"], "rtn-int4", calibration=[torch.randn(1, 8, 64)], attention="int8", progress=False)
    qgen.save(model["a"], tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["qgen"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    for change in ({"layers": {"nowhere": ["int8"]}}, {"layers": {"": ["int9"]}}, {"edges": [2, 1]}, {"more": 1}):
        told = {k: v for k, v in header.items() if k != "sha256"}
        told["attention"] = {**header["attention"], **change}
        save_file(tensors, path, {"format": "pt", "qgen": _dumps({**told, "sha256": _sum(told)})})
        into = attend()
        with pytest.raises(BadCheckpoint):
            qgen.load(tmp_path, into=into)
        assert type(into) is Attend and not hasattr(into, "qgen_attention")


def test_masks_are_honoured():
    """A mask that hides the keys with the largest values: without it the output is another one altogether."""
    model, x = attend(), torch.randn(1, 40, 64)
    x[:, 30:] *= 6
    masks = {
        "bool": torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(),
        "float": torch.zeros(40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf),
    }
    free = model(x)
    install(model, Choices({"": ("int8",)}))
    for mask in masks.values():
        remove(model)
        want = model(x, mask=mask)
        install(model, Choices({"": ("int8",)}))
        assert error(model(x, mask=mask), want) < 0.02
        assert error(model(x), want) > 0.3
    assert error(model(x), free) < 0.02


@pytest.mark.parametrize("spec", ["int8", "int8_fp8", "fp4_fp8", "fp4"])
def test_causal_and_grouped_heads(spec):
    x = torch.randn(2, 70, 64)
    for options in ({"is_causal": True}, {"heads": 4, "kv_heads": 2, "enable_gqa": True}, {"scale": 0.3}):
        model = attend(**options)
        want = model(x)
        install(model, Choices({"": (spec,)}))
        got = model(x)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert 0 < error(got, want) < {"int8": 0.01, "int8_fp8": 0.04, "fp4_fp8": 0.15, "fp4": 0.2}[spec]


def test_what_is_not_served_goes_through_bit_for_bit():
    q, x = torch.randn(1, 2, 9, 32), torch.randn(1, 1, 64)
    model = attend()
    want = model(x)
    install(model, Choices({"": ("int8",)}))
    assert torch.equal(model(x), want)  # a single query
    assert refusal(q, q, q) == ""
    assert "dropout" in refusal(q, q, q, dropout_p=0.1)
    assert "four" in refusal(q[0], q[0], q[0]) and "four" in refusal(q, q, q[..., :16])
    assert "causal" in refusal(q[:, :, :5], q, q, is_causal=True)
    assert "float dtype" in refusal(q.double(), q.double(), q.double())
    assert "batch" in refusal(q[:, :1].expand(1, 3, 9, 32), q, q, enable_gqa=True)
    assert "scale" in refusal(q, q, q, scale=-1.0)


def test_only_the_owner_and_only_this_model_is_rerouted():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = attend(), attend()

        def forward(self, x):
            return self.a(x), self.b(x)

    torch.manual_seed(0)
    model, other, x = Two(), Two(), torch.randn(1, 20, 64)
    want = model(x)
    install(model, Choices({"a": ("int8",)}))
    got = model(x)
    assert not torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert torch.equal(other(x)[0], want[0]) and type(other.a) is Attend
    assert isinstance(model.a, Attend) and type(model.a).__name__ == "Attend"
    q = torch.randn(1, 2, 20, 32)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


def test_the_clock_picks_by_timestep():
    model, x = attend(), torch.randn(1, 20, 64)
    want = model(x)
    install(model, Choices({"": ("", "fp4", "int8")}, edges=(100.0, 900.0), argument="timestep"))
    found = [error(model(x, timestep=torch.tensor([t])), want) for t in (50.0, 100.0, 100.5, 900.0, 901.0)]
    assert found[0] == found[1] == 0 and found[2] == found[3] > 0.02 and 0 < found[4] < 0.01
    assert error(model(x, timestep=950), want) == found[4]
    assert error(model(x, None, torch.tensor([500.0])), want) == found[2]  # by position
    twin = copy.deepcopy(model)
    twin(x, timestep=torch.tensor([50.0]))
    assert error(twin(x, timestep=torch.tensor([500.0])), want) == found[2]
    remove(model)
    assert torch.equal(model(x, timestep=torch.tensor([500.0])), want) and not model._forward_pre_hooks
    remove(twin)
    assert not twin._forward_pre_hooks


class Multi(nn.Module):
    """torch's own attention module, whose forward is one function of torch."""

    def __init__(self, need_weights=False):
        super().__init__()
        self.attn, self.need_weights = nn.MultiheadAttention(64, 2, batch_first=True), need_weights
        self.out = nn.Linear(64, 64)

    def forward(self, x, mask=None):
        return self.out(self.attn(x, x, x, key_padding_mask=mask, need_weights=self.need_weights)[0])


def multi(**options):
    torch.manual_seed(0)
    return Multi(**options).eval().requires_grad_(False)


def test_torch_multihead_attention_is_caught():
    model, x = multi(), torch.randn(2, 24, 64)
    x[:, 20:] *= 6
    mask = torch.zeros(2, 24, dtype=torch.bool)
    mask[:, 20:] = True
    free, want = model(x), model(x, mask)
    qgen.quantize(model, qgen.Recipe(qgen.Spec("fp8_e4m3_row")), calibration=[x], attention="int8", progress=False)
    assert set(model.qgen_attention.layers) == {"attn"} and type(model.attn.out_proj).__name__.startswith("NonDyn")
    layers = multi()
    qgen.quantize(layers, qgen.Recipe(qgen.Spec("fp8_e4m3_row")), calibration=[x], progress=False)
    assert 0 < error(model(x), layers(x)) < 0.05 and 0 < error(model(x, mask), layers(x, mask)) < 0.05  # P v in fp8
    assert error(model(x), free) < 0.06 and error(model(x, mask), want) < 0.06 and error(free, want) > 0.3
    row = next(row for row in model.qgen_report if row["kind"] == "stack")
    assert row["path"] == "attn" and "reads past their layers: in_proj_weight (192, 64), out_proj.weight" in row["why"]
    assert row["bytes16"] == 2 * 4 * 64 * 64
    remove(model)
    assert torch.equal(model(x), layers(x))


def test_torch_multihead_attention_with_weights_is_listed():
    model, x = multi(need_weights=True), torch.randn(1, 24, 64)
    want = model(x)
    qgen.quantize(model, qgen.Recipe(qgen.Spec("fp8_e4m3_row")), calibration=[x], attention="int8", progress=False)
    assert not model.qgen_attention.layers and error(model(x), want) < 0.06
    row = next(row for row in model.qgen_report if row["kind"] == "attention")
    assert row["path"] == "attn" and row["spec"] == "float" and "by itself" in row["why"]


def test_a_packed_layer_that_torch_reads_is_refused_by_name():
    """Packed by hand: `quantize` leaves it alone. The zeros of the placeholder would give zeros without a word."""
    from qgen.nn import packed_layer
    from qgen.recipe import Spec
    from qgen.site import Draft, Site

    model = multi()
    old = model.attn.out_proj
    draft = Draft(
        (Site("attn.out_proj", "linear", "", 0, "", (64, 64)),), Spec("int4_g64"), old.weight.clone(), old.bias
    )
    model.attn.out_proj = packed_layer(draft, old)
    model.attn.out_proj.path = "attn.out_proj"
    model.attn.out_proj.prepare()
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(RuntimeError, match=r"'attn\.out_proj' is read by"):
            model(torch.randn(1, 24, 64))


def test_data_free_quantization_leaves_it_alone():
    model, x = multi(), torch.randn(1, 24, 64)
    want = model(x)
    qgen.quantize(model, qgen.Recipe(qgen.Spec("int8_row")), progress=False)
    assert error(model(x), want) < 0.05 and not hasattr(model.attn.out_proj, "codes") and hasattr(model.out, "codes")


def test_gradients_are_those_of_float_attention():
    model, x = attend(), torch.randn(1, 20, 64)
    x.requires_grad_(True)
    model(x).square().sum().backward()
    want, x.grad = x.grad, None
    install(model, Choices({"": ("int8",)}))
    model(x).square().sum().backward()
    assert error(x.grad, want) < 0.02


def test_offloading_hooks_put_on_before_or_after():
    """Hooks that replace `forward` on the instance, as accelerate's do, do not hide the reroute."""
    x = torch.randn(1, 20, 64)
    model = attend()
    install(model, Choices({"": ("int8",)}))
    want = model(x)
    model = attend()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    install(model, Choices({"": ("int8",)}))
    assert torch.equal(model(x), want)


def test_diffusers_dispatcher_is_led_to_torch_for_this_model_alone():
    from diffusers.models.attention_dispatch import AttentionBackendName

    model, other = FAMILIES["flux"][0](), FAMILIES["flux"][0]()
    path = "transformer_blocks.0.attn"
    install(model, Choices({path: ("int8",)}))
    assert model.get_submodule(path).processor._attention_backend == AttentionBackendName.NATIVE
    assert other.get_submodule(path).processor._attention_backend is None
    remove(model)
    assert model.get_submodule(path).processor._attention_backend is None


def test_transformers_generates_with_grouped_heads():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    ).eval()  # fmt: skip
    ids = torch.arange(1, 21)[None]
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    mask = (padded > 0).long()
    want = model(padded, attention_mask=mask).logits[:, 6:]
    install(model, Choices({f"model.layers.{i}.self_attn": ("int8",) for i in range(2)}))
    assert model.config._attn_implementation == "qgen"
    got = model(padded, attention_mask=mask).logits[:, 6:]
    assert 0 < error(got, want) < 0.02
    assert error(model(padded).logits[:, 6:], want) > error(got, want)  # padding counts where the mask is dropped
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
    remove(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(padded, attention_mask=mask).logits[:, 6:], want)


def test_the_op_is_a_proper_op():
    q, k = torch.randn(1, 4, 9, 32), torch.randn(1, 2, 9, 32)
    table, where = torch.tensor([0, 1]), torch.tensor(1)
    for mask, causal in ((None, True), (torch.rand(9, 9) > 0.3, False)):
        args = (q, k, k, mask, causal, None, where, table, ",int8")
        torch.library.opcheck(
            torch.ops.qgen.attention_choice.default, args, test_utils=("test_schema", "test_faketensor")
        )
    plain = torch.ops.qgen.attention_choice(q, k, k, None, False, 0.2, torch.tensor(0), table, ",int8")
    assert error(plain, attention_float(q, k, k, scale=0.2)[0]) < 1e-6


@pytest.mark.slow
def test_torch_multihead_attention_compiles_into_one_graph():
    model, x = multi(), torch.randn(2, 24, 64)
    install(model, Choices({"attn": ("int8",)}))
    want = model(x)
    torch._dynamo.reset()
    assert error(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_compiles_into_one_graph(name):
    make, call = MODELS[name]
    model = make()
    qgen.quantize(model, "rtn-int4", calibration=calls(name), attention="int8", progress=False)
    want = first(call(7).run(model))
    torch._dynamo.reset()
    assert error(first(call(7).run(torch.compile(model, fullgraph=True))), want) < 1e-4


@pytest.mark.slow
def test_graphs_serve_every_timestep_and_every_layer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = attend(), attend()

        def forward(self, x, timestep):
            return self.a(x) + self.b(x)

    model, x = Two(), torch.randn(1, 20, 64)
    choices = Choices({"a": ("", "int8", "fp4"), "b": ("int8", "", "")}, edges=(100.0, 900.0), argument="timestep")
    install(model, choices)
    times = [torch.tensor([t]) for t in (50.0, 100.0, 500.0, 950.0)]
    want = [model(x, t) for t in times]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    got = [compiled(x, t) for t in times]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counter.frame_count <= 2  # the second replaces the first, made before the clock's tensor was the graph's
