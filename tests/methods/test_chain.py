"""Smoothing, rotation and scales of tokens together: ViDiT-Q's and QuantVGGT's cards, and what any quantized model must pass."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

import qgen
from qgen.methods.balance import Balance
from qgen.methods.base import Stats, refine
from qgen.methods.clip import Clip
from qgen.methods.rotate import Rotate
from qgen.methods.smooth import Smooth
from qgen.methods.temporal import Static
from qgen.recipe import Recipe, Spec
from qgen.site import Draft, Site
from tests.tiny import first, net, net_calls

N, K = 64, 128


def stats(fit, held):
    return Stats(fit, held, fit.T @ fit / len(fit), fit.abs().amax(0), fit.abs().mean(0))


def draft(weight="int4_row", act="int4_row", methods=()):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(5)) / K**0.5
    return Draft((Site("layer", "linear", "", 0, "x", (N, K)),), Spec(weight, act, tuple(methods)), w)


def outliers(m, seed):
    """Channels that are always large."""
    x = torch.randn(m, K, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 40
    x[:, 77] *= 25
    return x


# -- the chain is the float function, in this process and the next -----------------------------------------------------
@pytest.mark.parametrize("first_method", [Smooth(), Balance()], ids=["smooth", "balance"])
def test_rotated_and_smoothed_the_function_is_the_float_one_for_any_number_of_tokens(first_method):
    made = Rotate().refine(
        first_method.refine(draft(), stats(outliers(512, 1), outliers(256, 2))), stats(outliers(64, 1), None)
    )
    assert made.smooth is not None and made.hadamard
    for tokens in (1, 7, 300):
        x = outliers(tokens, tokens).double()
        got = made.inputs(x, quantized=False).double() @ made.target().double().T
        want = x @ made.weight.double().T
        assert float((got - want).norm() / want.norm()) < 1e-6


LOADED = """
import sys, torch, qgen
from torch import nn
x = torch.load(sys.argv[1] + "/x.pt", weights_only=True)
found = []
for name in ("int4", "float"):
    made = qgen.load(sys.argv[1] + "/" + name, into=nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128)).eval())
    qgen.prepare(made, "reference")
    with torch.no_grad():
        plain = nn.functional.linear(x, made[0].dequantize(), made[0].bias)
        found.append((made(x), made[0].hadamard, made[0](x), plain))
torch.save(found, sys.argv[1] + "/y.pt")
"""


def test_another_process_loads_the_same_rotation_and_smoothing(tmp_path):
    """Bit for bit, rounded inputs or not; and where only weights are rounded, through the chain or by the weight it stands for."""
    calls, x, wanted = [outliers(64, seed) for seed in range(6)], outliers(32, 99), []
    torch.save(x, tmp_path / "x.pt")
    for name, act in (("int4", "int4_row"), ("float", None)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).eval().requires_grad_(False)
        qgen.quantize(model, Recipe(Spec("int4_row", act, (Smooth(), Rotate()))), calibration=calls, progress=False)
        qgen.prepare(model, "reference")
        qgen.save(model, tmp_path / name)
        wanted.append(model(x))
    command = [sys.executable, "-c", LOADED, str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # which sets the last bit of sums
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    for (out, *_), want in zip(found, wanted, strict=True):
        assert torch.equal(out, want)
    _, hadamard, _, _ = found[0]
    assert hadamard == 128, "the rotation helps here, and is what is tested"
    _, _, chain, plain = found[1]
    assert float((chain - plain).norm() / plain.norm()) < 1e-5


# -- one scale for each token ----------------------------------------------------------------------------------------------
def test_a_scale_for_each_token_where_tokens_differ_in_size():
    """ViDiT-Q, test 3: tokens of size e^N(0, 1), 4 bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1024, K, generator=g) * torch.randn(1024, 1, generator=g).exp()
    s = stats(x[:512], x[512:])
    weight = draft("int8_row", "int4_row")
    tensor = refine(replace(weight, spec=replace(weight.spec, methods=(Static(factors=1),))), s)

    def by_token(made):
        want = s.held @ made.weight.T
        lost = (made.inputs(s.held) @ made.values().T - want).square().sum(1) / want.square().sum(1)
        return float(lost.mean())

    assert by_token(weight.rounded()) <= 0.3 * by_token(tensor)
    assert weight.error(s.held) < tensor.error(s.held)


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize(
    "weight, act",
    [
        ("int4_row", "int8_row"),
        ("int4_g64", "uint4_g64"),
        ("nvfp4", "nvfp4_dynamic"),
        ("fp4_e2m1_g64", "fp8_e4m3_row"),
    ],
)
def test_what_a_sample_becomes_does_not_depend_on_its_batch(weight, act, kernel):
    """ViDiT-Q, test 4: the guided half alone or beside the other one, a hundred times as large, bit for bit. (Attention in between, which
    is float and not ours, is in torch no longer the same in another batch.)"""
    model = nn.Sequential(nn.Linear(64, K), nn.GELU(), nn.Linear(K, 64)).eval().requires_grad_(False)
    qgen.quantize(model, Recipe(Spec(weight, act)), progress=False)
    if kernel:
        qgen.prepare(model, kernel)
    x = torch.randn(2, 24, 64)
    assert torch.equal(model(x), model(torch.cat([100 * x, x]))[2:])


def test_one_scale_measured_over_the_batch_would_depend_on_it():
    """The test above can fail: with one scale for the whole input the other half sets it."""
    x = torch.randn(4, K)
    fmt = qgen.formats.get("fp8_e4m3_tensor")
    alone, both = fmt.fake(x), fmt.fake(torch.cat([300 * x, x]))[4:]
    assert not torch.equal(alone, both)


# -- special tokens ------------------------------------------------------------------------------------------------------
def scene(seed):
    """QuantVGGT's card: 256 tokens, two of whose channels are eight times larger, and five special ones."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(261, K, generator=g)
    x[:, [11, 60]] *= 8
    x[:5] += torch.zeros(K).index_put((torch.tensor([7, 40, 99]),), torch.tensor([90.0, -70.0, 60.0]))
    return x


@pytest.mark.parametrize("seed", range(3))
def test_learned_smoothing_rotation_and_clips_beat_the_rotation_and_that_nothing(seed):
    fit, held = (torch.cat([scene(1000 * seed + i) for i in numbers]) for numbers in (range(4), range(10, 12)))
    s = stats(fit, held)
    none = draft().error(held)
    rotated = refine(draft(methods=(Rotate(),)), s).error(held)
    learned = refine(draft(methods=(Balance(), Rotate(), Clip())), s).error(held)
    assert learned <= 0.9 * rotated and rotated <= 0.9 * none, (learned / rotated, rotated / none)


def test_only_what_is_quantized_changes():
    model, before = net(), {name: t.clone() for name, t in net().state_dict().items()}
    recipe = Recipe(Spec("int4_g64", "int4_g64", (Balance(steps=5), Clip()))).skip("head")
    qgen.quantize(model, recipe, calibration=net_calls(3, 1), progress=False)
    packed = {path for path, m in model.named_modules() if hasattr(m, "canonical")}
    rest = {name: t for name, t in before.items() if name.rpartition(".")[0] not in packed}
    assert rest and packed
    now = model.state_dict()
    assert all(torch.equal(now[name], t) for name, t in rest.items())
    for path in packed:
        if f"{path}.bias" in before:
            assert torch.equal(now[f"{path}.bias"].float(), before[f"{path}.bias"].float())


# -- it is on --------------------------------------------------------------------------------------------------------------
def test_every_number_of_bits_gives_another_output_and_more_bits_a_nearer_one():
    call, given = net_calls(9, 1).calls[-1], net_calls()
    specs = [
        Spec(f"int{w}_g64", a)
        for w, a in ((8, None), (8, "int8_row"), (4, "int8_row"), (4, "int4_g64"), (3, "int4_g64"), (2, "int4_g64"))
    ]
    outs = [first(call.run(net()))]
    outs += [first(call.run(qgen.quantize(net(), Recipe(s), calibration=given, progress=False))) for s in specs]
    assert not any(torch.equal(a, b) for a, b in combinations(outs, 2))
    errors = [float((y - outs[0]).norm()) for y in outs[1:]]
    assert errors == sorted(errors)
