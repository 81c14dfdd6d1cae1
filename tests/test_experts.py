"""Mixtures of experts: stacked matrices become layers, are fitted by the tokens that reach them, packed, saved, loaded."""

import copy

import pytest
import torch

import qgen
from qgen.calibration.base import Call, Moment
from qgen.io.float_layers import dequantize
from qgen.nn.experts import Experts, opened, unstack
from qgen.nn.packed import Packed

transformers = pytest.importorskip("transformers", reason="the experts are transformers'")
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "vocab_size": 96, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "layer_types": None,
}  # fmt: skip


def moe(kind="Mixtral"):
    """Two blocks of four experts, two of them for each token."""
    import inspect

    config = getattr(transformers, f"{kind}Config")
    taken = {name: value for name, value in SMALL.items() if name in inspect.signature(config).parameters}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**taken)).eval().requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 3 or (p.ndim == 2 and not float(p.abs().max())):
            p.normal_(0, 0.1)
    return model


def call(seed=0, rows=2, length=40):
    ids = torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Call((), {"input_ids": ids, "use_cache": False}, Moment(seed))


def run(model, seed=9):
    with torch.no_grad():
        return call(seed).run(model).logits


def error(got, want):
    return float((got - want).norm() / want.norm())


KINDS = ["Mixtral", "Qwen3Moe", "GptOss"]


@pytest.mark.parametrize("kind", KINDS)
def test_opened_experts_compute_what_the_stack_did(kind):
    model = moe(kind)
    want, names = run(model), set(model.state_dict())
    stack = model.model.layers[1].mlp.experts.down_proj
    with opened([model]):
        assert torch.allclose(run(model), want, atol=1e-5, rtol=1e-4)
        inside = model.model.layers[1].mlp.experts.down_proj
        assert isinstance(inside, Experts) and torch.equal(inside.stack, stack)
        with pytest.raises(TypeError, match="one by one"):
            inside[torch.tensor([0, 1])]
        with pytest.raises(TypeError, match="found add"):
            torch.add(torch.zeros(64), inside[0])
    assert set(model.state_dict()) == names and model.model.layers[1].mlp.experts.down_proj is stack
    assert model.model.layers[1].mlp.experts.config is model.config
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_packed_saved_and_loaded(kind, tmp_path):
    model = moe(kind)
    want, numel = run(model), sum(p.numel() for p in model.parameters())
    config = copy.deepcopy(model.config)
    qgen.quantize(model, "rtn-w4a16", calibration=[call()], progress=False)
    rows = [row for row in model.qgen_report if ".experts." in row["path"]]
    assert len(rows) == 2 * 2 * 4 and all(row["spec"].startswith("uint4_g64") for row in rows)
    assert sum(row["bytes16"] for row in rows) / 2 > 0.5 * numel
    got = run(model)
    assert 0 < error(got, want) < 0.6  # random routers send some tokens elsewhere, and that is most of it
    assert error(run(dequantize(copy.deepcopy(model))), got) < 1e-4
    assert model.config._experts_implementation == config._experts_implementation, "the switch is the experts' alone"
    assert torch.equal(run(copy.deepcopy(model)), got)
    qgen.save(model, tmp_path)
    for back in (qgen.load(tmp_path), type(model).from_pretrained(tmp_path, dtype=torch.float32)):
        assert sum(isinstance(m, Packed) for m in back.modules()) == sum(isinstance(m, Packed) for m in model.modules())
        assert torch.allclose(run(back), got, atol=1e-6, rtol=1e-5)


def test_gptq_fits_experts_by_their_own_tokens():
    """Against plain rounding in the same format, on tokens that were not seen."""
    calls = [call(seed, rows=4) for seed in range(8)]
    want, errors = run(moe()), {}
    for name, recipe in (
        ("gptq", qgen.recipes.get("gptq-w4a16")),
        ("plain", qgen.Recipe(qgen.Spec("uint4_g64")).skip("lm_head")),
    ):
        model = qgen.quantize(moe(), recipe, calibration=calls, progress=False)
        errors[name] = error(run(model), want)
        logs = [row["log"] for row in model.qgen_report if ".experts." in row["path"]]
        assert all(("gptq" in log) == (name == "gptq") for log in logs)
    assert errors["gptq"] < errors["plain"]


def test_an_expert_that_nobody_reaches():
    model = moe()
    model.model.layers[0].mlp.gate.weight.zero_()  # ties: the first two experts serve every token
    qgen.quantize(model, "gptq-w4a16", calibration=[call(seed) for seed in range(4)], progress=False)
    rows = {row["path"]: row for row in model.qgen_report if "layers.0.mlp.experts" in row["path"]}
    assert len(rows) == 8
    quiet = [row for row in rows.values() if "0 calibration tokens reached it" in row["why"]]
    assert len(quiet) == 4 and all("gptq" not in row["log"] for row in quiet)
    model.model.layers[0].mlp.gate.weight.normal_()
    assert torch.isfinite(run(model)).all()


def test_what_stays_float_is_a_stack_again():
    model = moe()
    names = {name for name in model.state_dict() if "experts" in name}
    recipe = qgen.recipes.get("rtn-w4a16").skip("*.experts.*")
    qgen.quantize(model, recipe, calibration=[call()], progress=False)
    assert {name for name in model.state_dict() if "experts" in name} == names
    assert not any(isinstance(m, Experts) for m in model.modules())


def test_a_failure_leaves_the_stacks_as_they_were():
    model = moe()
    names, want = set(model.state_dict()), run(model)
    broken = [call(0), Call((), {"input_ids": torch.full((1, 4), 10_000), "use_cache": False}, Moment(1))]
    with pytest.raises(IndexError):
        qgen.quantize(model, "gptq-w4a16", calibration=broken, progress=False)
    assert set(model.state_dict()) == names and torch.equal(run(model), want)


def test_unknown_stacks_are_left_alone():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.randn(4, 64, 64))

        def forward(self, x):
            return torch.bmm(x.expand(4, -1, -1), self.weights).sum(0)

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), Own())
    assert unstack(model) == []
    qgen.quantize(model, "rtn-w4a16", calibration=[torch.randn(8, 64)], progress=False)
    (row,) = (r for r in model.qgen_report if r["kind"] == "stack")
    assert row["path"] == "1" and "stacked in one parameter, which are no layers: weights (4, 64, 64)" in row["why"]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_packed_while_they_stream_in(kind, tmp_path):
    """The checkpoint of Mixtral and Qwen holds every expert by itself, and transformers stacks them; GPT-OSS's holds the stacks."""
    model = moe(kind)
    model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    kind_of, config = type(model), qgen.QGenConfig(skip=["lm_head"])
    want = qgen.quantize(model, config.recipe, progress=False)
    back = kind_of.from_pretrained(tmp_path / "float", quantization_config=config, dtype=torch.float32)
    packed = {path for path, m in want.named_modules() if isinstance(m, Packed)}
    assert {path for path, m in back.named_modules() if isinstance(m, Packed)} == packed
    assert sum(".experts." in path for path in packed) == 2 * 2 * 4
    assert {row["path"] for row in back.qgen_report} >= packed
    assert torch.equal(run(back), run(want))
    back.save_pretrained(tmp_path / "packed")
    again = kind_of.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(run(again), run(back))


def test_experts_that_a_recipe_keeps_stay_as_they_stream_in(tmp_path):
    """All of them: a stack as before. Some of them: ordinary layers beside packed ones."""
    moe().save_pretrained(tmp_path)
    kind = transformers.MixtralForCausalLM
    back = kind.from_pretrained(
        tmp_path, quantization_config=qgen.QGenConfig(skip=["*.experts.*"]), dtype=torch.float32
    )
    assert back.model.layers[0].mlp.experts.down_proj.shape == (4, 64, 96)
    some = qgen.QGenConfig(
        skip=["*.experts.down_proj.1", "*.self_attn.*", "*.experts.gate_up_proj.*", "*gate", "lm_head"]
    )
    back = kind.from_pretrained(tmp_path, quantization_config=some, dtype=torch.float32)
    layers = back.model.layers[0].mlp.experts.down_proj.layers()
    assert [isinstance(layer, Packed) for layer in layers] == [True, False, True, True]
    assert torch.equal(layers[1].weight, moe().model.layers[0].mlp.experts.down_proj[1])
    assert error(run(back), run(moe())) < 0.6


def test_experts_of_diffusers_are_packed_while_they_stream_in(tmp_path):
    from tests.coverage.denoisers import model_and_call

    make, given = model_and_call("NucleusMoEImageTransformer2DModel")
    model = make().eval()
    model.save_pretrained(tmp_path / "float", max_shard_size="100KB")
    want = qgen.quantize(model, "rtn-w4a16", progress=False)
    packed = {path for path, m in want.named_modules() if isinstance(m, Packed)}
    assert any(".experts." in path for path in packed)
    back = type(model).from_pretrained(
        tmp_path / "float", quantization_config=qgen.QGenConfig(), torch_dtype=torch.float32
    )
    assert {path for path, m in back.named_modules() if isinstance(m, Packed)} == packed
    with torch.no_grad():
        got = given.run(back)[0]
        assert torch.equal(got, given.run(want)[0])
    back.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed", torch_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(given.run(again)[0], got)
