"""`quantize` from end to end on tiny models: what it swaps, what it reports, and that a failure changes nothing."""

import contextlib
import copy
import errno
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qgen
from qgen import Recipe, Rule, Spec
from qgen.calibration.base import CalibrationSet
from qgen.calibration.recorder import Recorder
from qgen.errors import BadData, NoKernel, NotQuantizable
from qgen.methods.bias import BiasCorrection
from qgen.methods.gptq import GPTQ
from qgen.methods.lowrank import LowRank
from qgen.methods.reconstruct import Reconstruct
from qgen.methods.smooth import Smooth
from qgen.nn import QuantConv2d, QuantLinear
from qgen.nn.packed import Packed
from tests import tiny

CHAIN = qgen.recipes.get("svdquant-int4")  # the real chain; the models are what is small
QUICK = Spec(
    "int4_g64", "uint4_g64", (Smooth((0.3, 0.6)), LowRank(8, 1), GPTQ((0.1,)), Reconstruct(rounds=1), BiasCorrection())
)


def quantize(x, recipe=CHAIN, **options):
    return qgen.quantize(x, recipe, progress=False, **options)


def packed(module):
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Packed)}


def canonical(module):
    return {f"{path}.{slot}": t for path, layer in packed(module).items() for slot, t in layer.canonical().items()}


def same_bytes(a, b):
    bits = lambda t: t.contiguous().flatten().view(torch.uint8)  # noqa: E731
    return list(a) == list(b) and all(t.dtype == b[n].dtype and torch.equal(bits(t), bits(b[n])) for n, t in a.items())


def sqnr_db(want, got):
    return float(10 * torch.log10(want.square().sum() / (want - got).square().sum()))


@pytest.fixture(scope="module")
def finished():
    """A quantized `Net`, its float twin and the calls: made once, not to be changed."""
    model = tiny.net()
    twin = copy.deepcopy(model)
    return quantize(model, calibration=tiny.net_calls()), twin, tiny.net_calls()


# -- what is made ------------------------------------------------------------------------------------------------------
def test_inside_is_four_bits_and_outside_stays_float(finished):
    model, _, _ = finished
    assert sorted(packed(model)) == sorted(
        ["time", *(f"blocks.{i}.{p}" for i in (0, 1) for p in ("q", "k", "v", "o", "fc1", "fc2"))]
    )
    assert type(model.embed) is nn.Linear and type(model.head) is nn.Linear
    assert (
        model.blocks[0].q.weight_format == "int4_g64"
        and model.blocks[0].q.act_format == "uint4_g64"
        and model.blocks[0].q.rank == 16
    )
    assert model.time.act_format == "", "vectors keep 16-bit inputs"
    assert model.blocks[1].fc1.kernel


def test_the_output_is_near_and_not_the_same(finished):
    model, twin, _ = finished
    call = tiny.net_call(seed=77)
    want, got = call.run(twin), call.run(model)
    assert 15 < sqnr_db(want, got) < 60


def test_the_report_tells_everything_about_every_layer(finished):
    model, twin, _ = finished
    *rows, whole = model.qgen_report
    assert [r["path"] for r in rows] == [p for p, m in twin.named_modules() if isinstance(m, nn.Linear)]
    for row in rows:
        assert {"path", "kind", "shape", "spec", "kernel", "nbytes", "bytes16", "why"} <= set(row)
        layer = twin.get_submodule(row["path"])
        assert row["shape"] == list(layer.weight.shape) and row["bytes16"] == 2 * (
            layer.weight.numel() + layer.bias.numel()
        )
        if row["spec"] == "float":
            assert row["why"].startswith("embedder or head") and row["nbytes"] == row["bytes16"]
        elif row["path"] != "time":
            assert (
                row["sqnr_db"] > 15 and row["sqnr_fit_db"] > 15 and row["nbytes"] == packed(model)[row["path"]].nbytes
            )
            assert {"balance", "lowrank", "gptq"} <= set(row["log"])
    assert whole["path"] == "(output)" and 15 < whole["sqnr_db"] < 60
    assert model.qgen_recipe == CHAIN


def test_reported_sqnr_is_what_a_hook_measures(finished):
    """On held-out calls, against the float layer, with inputs of the quantized model: within a few tenths, for rows are a sample."""
    model, twin, calls = finished
    row = next(r for r in model.qgen_report if r["path"] == "blocks.0.q")
    seen = []
    hook = model.blocks[0].q.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    for call in calls.hold_out().calls:
        if call.moment.held:
            call.run(model)
    hook.remove()
    float_layer = twin.blocks[0].q
    want = torch.cat([x for x, _ in seen]) @ float_layer.weight.T
    got = torch.cat([y for _, y in seen]) - float_layer.bias
    assert sqnr_db(want, got) == pytest.approx(row["sqnr_db"], abs=0.3)


def test_the_chain_beats_rounding_to_nearest(finished):
    model, twin, calls = finished
    plain = quantize(copy.deepcopy(twin), "rtn-int4", calibration=calls)
    assert model.qgen_report[-1]["sqnr_db"] > plain.qgen_report[-1]["sqnr_db"] + 3


@pytest.mark.parametrize("name", ["pixart", "unet", "flux", "sd3", "wan", "sana", "llama", "t5", "plain"])
@pytest.mark.parametrize("recipe", [Recipe(QUICK, CHAIN.rules), "rtn-nvfp4"], ids=["svdquant", "rtn-nvfp4"])
def test_every_family(name, recipe):
    make, call = tiny.FAMILIES[name]
    model = make()
    want = tiny.first(call(9).run(model))
    calls = {"calibration": tiny.calls(name, 3)} if isinstance(recipe, Recipe) else {}
    assert quantize(model, recipe, **calls) is model
    got = tiny.first(call(9).run(model))
    assert got.shape == want.shape and got.isfinite().all() and not torch.equal(got, want)
    assert sqnr_db(want, got) > 5 and packed(model)
    assert {type(layer) for layer in packed(model).values()} <= {QuantLinear, QuantConv2d}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model = tiny.net().to(dtype)
    calls = [((c.args[0].to(dtype),), {"timestep": c.kwargs["timestep"].to(dtype)}) for c in tiny.net_calls(3, 1).calls]
    model.forward = lambda sample, timestep=None: _forward(model, sample)
    quantize(model, calibration=calls)
    assert model.blocks[0].q.compute_dtype == dtype == model.blocks[0].q.bias.dtype
    assert model.blocks[0].q.down.dtype == dtype


def _forward(model, sample):
    x = model.embed(sample)
    for block in model.blocks:
        x = block(x)
    return model.head(x)


def test_sharing_gives_q_k_v_one_smoothing_and_one_down():
    recipe = Recipe(replace(QUICK, share=True), CHAIN.rules)
    model = quantize(tiny.net(1), recipe, calibration=tiny.net_calls(3, 1))
    q, k, v = (getattr(model.blocks[0], x) for x in "qkv")
    assert torch.equal(q.down, k.down) and torch.equal(k.down, v.down) and not torch.equal(q.up, k.up)
    assert (q.smooth is None) == (v.smooth is None)


def test_k_that_the_block_does_not_divide_is_padded_and_said_so():
    model = nn.Sequential(nn.Linear(100, 64), nn.GELU(), nn.Linear(64, 48))
    quantize(model, "rtn-int4")
    why = {row["path"]: row["why"] for row in model.qgen_report}
    assert why["0"] == "default; K padded from 100 to 128" and "padded" not in why["2"]
    assert model[0].codes.shape == (64, 64) and model(torch.randn(3, 100)).shape == (3, 48)


def test_a_layer_used_under_two_names_is_packed_once_for_both():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    model.append(model[0])
    quantize(model, "rtn-int4")
    assert isinstance(model[0], QuantLinear) and model[3] is model[0]


def test_training_mode_is_put_back_and_running_statistics_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64)).train()
    mean = model[1].running_mean.clone()
    quantize(model, "svdquant-int4", calibration=[torch.randn(40, 64) for _ in range(3)])
    assert model.training and model[2].training and torch.equal(model[1].running_mean, mean)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).float().eval()


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "context",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
    ],
    ids=["default-bf16", "autocast", "inference", "grad"],
)
def test_the_callers_context_does_not_matter(context):
    calls = [torch.randn(2, 8, 64) for _ in range(4)]
    plain, inside = two_layers(), two_layers()
    quantize(plain, calibration=calls)
    with context():
        quantize(inside, calibration=calls)
    assert inside.qgen_report[-1]["sqnr_db"] == pytest.approx(plain.qgen_report[-1]["sqnr_db"], abs=1.5)
    x = torch.randn(3, 8, 64)
    assert sqnr_db(plain(x), inside(x)) > 15


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    model, calls = two_layers(), [torch.ones(2, 8, 64) * i for i in range(1, 4)]
    torch.manual_seed(5)
    quantize(model, calibration=calls)
    assert torch.equal(torch.rand(3), want)


# -- pipelines ---------------------------------------------------------------------------------------------------------
def small_recorder(**options):
    return Recorder(**{"samples": 4, "steps": 2, "batch": 1, **options})


def test_a_pipeline_is_recorded_quantized_and_given_back():
    pipe = tiny.Pipe()
    before = pipe("a", torch.Generator().manual_seed(0))
    assert quantize(pipe, prompts=["a", "b", "c", "d", "e"], calibration=small_recorder()) is pipe
    assert packed(pipe.transformer) and ["a"] in pipe.seen and ["e"] not in pipe.seen
    after = pipe("a", torch.Generator().manual_seed(0))
    assert not torch.equal(before, after) and sqnr_db(before, after) > 10


def test_call_kwargs_reach_the_pipeline():
    pipe, ran = tiny.Pipe(), []
    hook = pipe.transformer.embed.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(TypeError, match="tempo"):
        quantize(pipe, prompts=["a", "b"], call_kwargs={"tempo": 1}, calibration=small_recorder())
    assert ran == [] and not packed(pipe.transformer)
    quantize(pipe, "rtn-int4", prompts=["a", "b"], call_kwargs={"steps": 5}, calibration=small_recorder())
    hook.remove()
    assert len(ran) >= 10


def test_two_denoisers_are_both_quantized():
    pipe = tiny.Pipe()
    pipe.transformer_2 = tiny.net(1)
    quantize(pipe, "rtn-int4")
    assert packed(pipe.transformer) and packed(pipe.transformer_2)


def test_data_free_recipes_call_nothing():
    pipe = tiny.Pipe()
    quantize(pipe, "rtn-nvfp4")
    assert pipe.seen == [] and packed(pipe.transformer)
    assert all("weight_sqnr_db" in row for row in pipe.transformer.qgen_report if row["spec"] != "float")


# -- the same seed, the same bytes -------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_bytes(finished):
    model, twin, calls = finished
    assert same_bytes(canonical(quantize(copy.deepcopy(twin), calibration=calls)), canonical(model))


def test_little_memory_changes_the_number_of_replays_and_nothing_else():
    calls, made, replays = tiny.net_calls(), [], []
    for memory in ("1GiB", 6_000_000, 1):
        model, seen = tiny.net(), []
        model.embed.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        made.append(canonical(quantize(model, calibration=calls, memory=memory)))
        replays.append(len(seen))
    assert same_bytes(made[0], made[1]) and same_bytes(made[0], made[2])
    assert replays[0] < replays[1] < replays[2]


def test_another_seed_gives_other_bytes(finished):
    model, twin, calls = finished
    other = quantize(copy.deepcopy(twin), calibration=calls, seed=1)
    assert not same_bytes(canonical(other), canonical(model))


# -- whatever goes wrong, nothing is changed ---------------------------------------------------------------------------
@contextlib.contextmanager
def untouched(*modules):
    """On leaving: every module's state, submodules, attributes, modes and hooks are what they were."""
    before = [(m, tiny.snapshot(m), {n: (c, c.training) for n, c in m.named_modules()}, set(vars(m))) for m in modules]
    yield
    for module, state, children, names in before:
        assert tiny.same(module, state)
        assert {n: (c, c.training) for n, c in module.named_modules()} == children, "the very same objects"
        assert set(vars(module)) == names
        assert not any(c._forward_pre_hooks or c._forward_hooks for c in module.modules())


def interrupting(monkeypatch, after, error):
    """Makes GPTQ raise at its call number `after`, in the middle of a wave."""
    counted, original = [], GPTQ.refine

    def refine(self, draft, stats):
        counted.append(1)
        if len(counted) > after:
            raise error
        return original(self, draft, stats)

    monkeypatch.setattr(GPTQ, "refine", refine)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError("no memory"), RuntimeError("a bug")], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("after", [0, 5, 9])
def test_interrupted_inside_a_method(monkeypatch, after, error):
    model = tiny.net()
    interrupting(monkeypatch, after, error)
    with untouched(model), pytest.raises(type(error)):
        quantize(model, calibration=tiny.net_calls(3, 1), memory=1)


def test_interrupted_while_the_whole_is_judged(monkeypatch):
    """After the last layer is swapped, before the report is made."""
    model = tiny.net()
    from qgen import engine

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_output_row", broken)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        quantize(model, calibration=tiny.net_calls(3, 1))


def test_interrupted_while_recording():
    class Stopped(tiny.Pipe):
        def __call__(self, prompt, generator=None):
            super().__call__(prompt, generator)
            raise KeyboardInterrupt

    pipe = Stopped()
    with untouched(pipe.transformer), pytest.raises(KeyboardInterrupt):
        quantize(pipe)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(value):
    model = tiny.net()
    model.blocks[1].fc1.weight[3, 3] = value
    broken = model.blocks[1].fc1.weight.clone()
    with pytest.raises(BadData, match=r"Net: parameter blocks\.1\.fc1\.weight holds NaN or infinity"):
        quantize(model, "rtn-int4")
    assert not packed(model) and torch.equal(model.blocks[1].fc1.weight.nan_to_num(), broken.nan_to_num())


def test_a_calibration_call_with_nan():
    model, calls = tiny.net(), tiny.net_calls(3, 1)
    calls.calls[2].args[0][0, 0, 0] = float("nan")
    with untouched(model), pytest.raises(BadData, match=r"calibration call 2, argument args\.0: holds NaN or infinity"):
        quantize(model, calibration=calls)


class Overflowing(nn.Module):
    """Gives NaN on inputs that are large, which only some calls have."""

    def forward(self, x):
        return torch.where(x.abs().amax() > 50, x * float("nan"), x)


@pytest.mark.parametrize("memory", [None, 1], ids=["one-wave", "many-waves"])
def test_nan_that_arises_inside(memory):
    model, calls = tiny.net(), tiny.net_calls(3, 1)
    model.blocks[1].norm = Overflowing()
    calls.calls[2].args[0].mul_(1e4)
    with (
        untouched(model),
        pytest.raises(BadData, match=r"layer blocks\.1\.q: its input holds NaN or infinity on calibration call"),
    ):
        quantize(model, calibration=calls, memory=memory)


def test_a_second_denoiser_that_fails_puts_the_first_back():
    pipe = tiny.Pipe()
    pipe.transformer_2 = tiny.net()
    pipe.transformer_2.blocks[1].norm = Overflowing()
    bad = tiny.net_calls(3, 1)
    bad.calls[2].args[0].mul_(1e4)
    with untouched(pipe.transformer, pipe.transformer_2), pytest.raises(BadData):
        quantize(pipe, calibration={"transformer": tiny.net_calls(3, 1), "transformer_2": bad})


def test_a_full_disk(monkeypatch, tmp_path):
    model, writes, original = tiny.net(), [], os.replace

    def full(source, target):
        writes.append(target)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(source, target)

    monkeypatch.setattr(os, "replace", full)
    with untouched(model), pytest.raises(OSError, match="No space left"):
        quantize(model, calibration=tiny.net_calls(3, 1), memory=1, checkpoint=tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "no half-written file is left"
    monkeypatch.undo()
    quantize(model, calibration=tiny.net_calls(3, 1), memory=1, checkpoint=tmp_path)  # goes on from what was kept
    assert packed(model)


def test_a_kernel_that_nobody_has(monkeypatch):
    from qgen.kernels import registry

    model = tiny.net()
    monkeypatch.setattr(
        registry.kernels,
        "_items",
        {n: replace(k, needs=replace(k.needs, devices=("moon",))) for n, k in registry.kernels.items()},
    )
    with untouched(model), pytest.raises(NoKernel, match="runs on moon, not cpu"):
        quantize(model, "rtn-int4")


def test_quantized_already(finished):
    with pytest.raises(NotQuantizable, match=r"Net is quantized already .* load the 16-bit model first"):
        quantize(finished[0], "rtn-int4")


def test_calibration_may_be_a_ready_set_and_is_not_split_again(finished):
    _, twin, calls = finished
    marked = calls.hold_out(0.4)
    model = quantize(
        copy.deepcopy(twin),
        Recipe(Spec("int4_g64", None, (GPTQ(),)), (Rule("*", None, role="outside"),)),
        calibration=marked,
    )
    assert isinstance(marked, CalibrationSet) and packed(model)


def test_progress_off_prints_nothing(capsys):
    quantize(tiny.plain(), "rtn-int4")
    quantize(tiny.net(1), calibration=tiny.net_calls(2, 1))
    assert capsys.readouterr() == ("", "")


def test_any_object_with_a_denoiser_is_a_pipeline():
    pipe = SimpleNamespace(unet=tiny.unet())
    quantize(pipe, "rtn-int4")
    assert any(isinstance(layer, QuantConv2d) for layer in packed(pipe.unet).values())


# -- one bad call of many ------------------------------------------------------------------------------------------------
def test_one_call_of_many_that_overflows_inside_is_dropped_and_named(caplog):
    model, calls = tiny.net(), tiny.net_calls(6, 2)
    model.blocks[1].norm = Overflowing()
    calls.calls[5].args[0].mul_(1e4)
    quantize(model, calibration=calls)
    line = "sample 2, step 1, timestep 0.8: the input of layer blocks.1.q holds NaN or infinity"
    assert f"calibration call dropped: {line}" in caplog.text and line in model.qgen_report[-1]["why"]
    twin = tiny.net()
    twin.blocks[1].norm = Overflowing()
    rest = CalibrationSet(tuple(c for i, c in enumerate(tiny.net_calls(6, 2).hold_out().calls) if i != 5))
    quantize(twin, calibration=rest)
    assert same_bytes(canonical(model), canonical(twin)), "as if the call had never been recorded"
