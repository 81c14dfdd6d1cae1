"""The modulation cache: found structurally, bit-identical when hit, right when missed, and its bytes."""

import pytest
import torch

from qgen.engine import record
from qgen.errors import NotQuantizable
from qgen.methods.modulation import cache_modulation, temporal_modules
from qgen.methods.modulation_curve import Curve
from tests.tiny import FAMILIES


def run(module, call):
    with torch.no_grad():
        out = call.run(module)
    return out[0] if isinstance(out, tuple) else out.sample


def at(call, timestep):
    """The call at other timesteps."""
    from dataclasses import replace

    old = call.kwargs["timestep"]
    return replace(
        call,
        kwargs={**call.kwargs, "timestep": torch.full_like(old, timestep * (1 if old.is_floating_point() else 1000))},
    )


WANTED = {
    "pixart": ({"adaln_single"}, {"kwargs.timestep"}),
    "flux": (
        {"time_text_embed", "norm_out.linear", "transformer_blocks.0.norm1.linear"},
        {"kwargs.timestep", "kwargs.pooled_projections"},
    ),
    "sd3": (
        {"time_text_embed", "norm_out.linear", "transformer_blocks.0.norm1.linear"},
        {"kwargs.timestep", "kwargs.pooled_projections"},
    ),
}


@pytest.mark.parametrize("family", WANTED)
def test_finds_what_the_timestep_decides(family):
    make, call = FAMILIES[family]
    found = temporal_modules(make(), call(0))
    paths, keys = WANTED[family]
    assert paths <= set(found)
    assert {name for names in found.values() for name in names} == keys
    assert not any(inner != outer and inner.startswith(outer + ".") for inner in found for outer in found)


@pytest.mark.parametrize("family", WANTED)
@pytest.mark.parametrize("offload", [False, True])
def test_hits_and_misses_give_the_bits_of_the_plain_model(family, offload, monkeypatch):
    make, call = FAMILIES[family]
    module, calls = make(), [at(call(0), t) for t in (0.25, 0.5, 0.75)]
    wanted = [run(module, c) for c in calls]
    ran, plain = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: ran.append(self) or plain(self, x))
    cache = cache_modulation(module, call(0), offload=offload)
    served = {id(layer) for part in cache.parts.values() for layer in part.modules()}
    first = [run(module, c) for c in calls]
    ran.clear()
    again = [run(module, c) for c in reversed(calls)]  # another order: keys are values, not counts
    assert ran and not any(id(layer) in served for layer in ran), "a module ran although its output was stored"
    assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, reversed(wanted), strict=True))
    assert (cache.hits, cache.misses) == (3, 3)
    assert torch.equal(run(module, at(call(0), 0.6)), run(make(), at(call(0), 0.6)))  # an unseen timestep is computed


def test_other_text_at_the_same_timestep_is_a_miss():
    make, call = FAMILIES["sd3"]
    module = make()
    cache = cache_modulation(module, call(0))
    run(module, call(0))
    other = call(1)
    assert torch.equal(run(module, other), run(make(), other))
    assert cache.misses == 2


def test_limit_forgets_the_oldest_and_stays_right():
    make, call = FAMILIES["pixart"]
    module = make()
    cache = cache_modulation(module, call(0), limit=1)
    for t in (0.1, 0.2, 0.1):
        assert torch.equal(run(module, at(call(0), t)), run(make(), at(call(0), t)))
    assert len(cache.entries) == 1


def test_a_call_that_fails_leaves_no_half_entry():
    make, call = FAMILIES["pixart"]
    module = make()
    cache = cache_modulation(module, call(0))
    bad = call(0)
    with pytest.raises(RuntimeError):
        run(module, type(bad)(bad.args, {**bad.kwargs, "encoder_hidden_states": torch.randn(2, 5, 7)}))
    assert torch.equal(run(module, call(0)), run(make(), call(0)))
    assert not cache.hits or all(len(e.outputs) == len(cache.parts) for e in cache.entries.values())


def test_bytes_are_counted_and_removal_restores():
    make, call = FAMILIES["flux"]
    module = make()
    before = set(module.state_dict())
    cache = cache_modulation(module, call(0))
    run(module, call(0))
    told = cache.report()
    weights = sum(p.nbytes for part in cache.parts.values() for p in part.parameters())
    outputs = [out for entry in cache.entries.values() for out in entry.outputs.values()]
    stored = sum(t.nbytes for out in outputs for t in (out if isinstance(out, tuple) else (out,)))
    assert told["weight_bytes"] == weights and told["table_bytes"] == stored and told["saved_bytes"] == weights - stored
    assert set(module.state_dict()) == before
    cache.remove()
    assert all("forward" not in m.__dict__ for m in module.modules())
    with pytest.raises(NotQuantizable, match="nothing to cache"):
        cache_modulation(torch.nn.Sequential(torch.nn.Linear(4, 4)), type(call(0))((torch.randn(2, 3, 4),), {}))


def test_curve_is_exact_at_its_knots_and_halves_error_with_rank():
    t = torch.linspace(0, 1, 33)
    basis = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    values = torch.stack([t, torch.sin(4 * t), t.square()], 1) @ basis + 1
    exact = Curve.fit(t, values, 3)
    torch.testing.assert_close(exact(t), values, atol=1e-5, rtol=1e-5)
    between = (t[1:] + t[:-1]) / 2
    truth = torch.stack([between, torch.sin(4 * between), between.square()], 1) @ basis + 1
    assert exact.disturbance(between, truth) < 1e-4
    assert Curve.fit(t, values, 1).disturbance(between, truth) > 10 * exact.disturbance(between, truth)
    assert exact.nbytes < values.nbytes
    with pytest.raises(ValueError, match="two different"):
        Curve.fit(torch.ones(3), torch.randn(3, 4), 1)


def test_curves_answer_on_a_miss_where_they_disturb_little(monkeypatch):
    make, call = FAMILIES["pixart"]
    module = make()
    wanted = run(module, at(call(0), 0.3456))
    cache = cache_modulation(module, call(0))
    whole = cache.bend(call(0), torch.linspace(0, 1000, 65), rank=64, budget=1.0)
    assert set(cache.curves) == set(whole) == {"adaln_single"} and cache.report()["curve_bytes"] > 0
    ran, plain = [], torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: ran.append(self) or plain(self, x))
    served = {id(layer) for part in cache.parts.values() for layer in part.modules()}
    got = run(module, at(call(0), 0.3456))
    assert not served & {id(layer) for layer in ran} and not torch.equal(got, wanted)
    assert (got - wanted).norm() / wanted.norm() < 10 * max(whole.values()) ** 0.5
    again = run(module, at(call(0), 0.3456))
    assert torch.equal(again, got) and cache.hits >= 1
    strict = cache.bend(call(0), torch.linspace(0, 1000, 65), rank=64, budget=0.0)
    assert strict == pytest.approx(whole, rel=1e-3) and not cache.curves, "disturbs too much: computed"
    assert torch.equal(run(module, at(call(0), 0.3456)), wanted)


def test_beyond_the_knots_it_is_computed():
    make, call = FAMILIES["pixart"]
    module = make()
    wanted = run(module, at(call(0), 0.9))
    cache = cache_modulation(module, call(0))
    cache.bend(call(0), torch.linspace(100, 500, 9), budget=1.0)
    assert cache.curves and torch.equal(run(module, at(call(0), 0.9)), wanted)


def test_no_curve_over_two_arguments():
    make, call = FAMILIES["flux"]
    cache = cache_modulation(make(), call(0))
    with pytest.raises(NotQuantizable, match="one argument"):
        cache.bend(call(0), torch.linspace(0, 1, 5))


def test_pictures_of_the_cached_schedule_are_the_same_bit_for_bit(make_demo_pipe):
    pipe = make_demo_pipe()
    options = {"num_inference_steps": 8, "output_type": "pt"}
    draw = lambda: pipe("noto owl", generator=torch.Generator().manual_seed(3), **options).images  # noqa: E731
    wanted = draw()
    calls = record(pipe, ["noto owl"], samples=1, steps=1, progress=False)
    cache = cache_modulation(pipe.transformer, calls.calls[0])
    first, second = draw(), draw()
    assert torch.equal(first, wanted) and torch.equal(second, wanted)
    assert cache.misses == 8 and cache.hits == 8 and cache.report()["saved_bytes"] > 0
    longer = pipe(
        "noto owl", generator=torch.Generator().manual_seed(3), num_inference_steps=9, output_type="pt"
    ).images
    cache.remove()
    again = pipe("noto owl", generator=torch.Generator().manual_seed(3), num_inference_steps=9, output_type="pt").images
    assert torch.equal(longer, again), "another number of steps is computed anew"
