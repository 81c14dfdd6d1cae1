"""TFMQ-DM's cache and its choice: stored features are the computed ones bit for bit, and each module takes the nearer of two ways."""

import pytest
import torch

import qgen
from qgen.methods.modulation import cache_modulation
from qgen.methods.modulation_table import settle
from qgen.recipe import Recipe, Rule, Spec
from tests.tiny import unet, unet_call

TIMES = torch.linspace(999, 49, 20).round()
# Of the projections some in 3 bits, which suffer more than a table in 5 bits does, and some in 8 bits, which suffer less.
RULES = (
    Rule("*", None),
    Rule("time_embedding.*", Spec("int8_row")),
    Rule("*.time_emb_proj", Spec("int8_row")),
    Rule("down_blocks.*.time_emb_proj", Spec("int3_row")),
)


def at(t, seed=0):
    """A call with its own image and text, at timestep t."""
    call = unet_call(seed)
    return type(call)((call.args[0], torch.tensor([int(t)])), call.kwargs, call.moment)


def run(module, call):
    with torch.no_grad():
        return call.run(module)[0]


@pytest.fixture
def quantized():
    return qgen.quantize(unet(), Recipe(None, RULES), progress=False)


def features(module, paths, seed=0):
    """{path: outputs (20, D)} at all timesteps, by hooks on those that compute, and by what the cache serves to others."""
    cache, made = module.qgen_modulation, {path: [] for path in paths}
    for t in TIMES:
        run(module, at(t, seed))
        entry = next(reversed(cache.entries.values()))
        for path in paths:
            made[path].append(entry.outputs[path][0].clone())
    return {path: torch.stack(rows) for path, rows in made.items()}


def test_stored_features_are_those_of_a_quantized_model_bit_for_bit(quantized):
    plain = [run(quantized, at(t, seed)) for seed in (0, 1) for t in TIMES]
    cache = cache_modulation(quantized, at(500))
    first = [run(quantized, at(t, 0)) for t in TIMES]
    again = [run(quantized, at(t, 1)) for t in TIMES]  # another image at the same timesteps
    assert cache.misses == cache.hits == len(TIMES)
    assert all(torch.equal(a, b) for a, b in zip([*first, *again], plain, strict=True))


def test_features_do_not_depend_on_the_image(quantized):
    cache = cache_modulation(quantized, at(500))
    paths = cache.timed()
    assert "time_embedding" in paths and any(path.endswith("time_emb_proj") for path in paths)
    one = features(quantized, paths, seed=0)
    cache.clear()
    other = features(quantized, paths, seed=1)
    assert all(torch.equal(one[path], other[path]) for path in paths)


def test_each_module_takes_the_smaller_error_and_the_whole_is_below_both_policies(quantized):
    teacher = unet()
    cache = cache_modulation(teacher, at(500))
    paths = cache.timed()
    wanted = features(teacher, paths)
    cache.remove()
    assert "qgen_modulation" not in teacher.__dict__
    cache = cache_modulation(quantized, at(500))
    computed = features(quantized, paths)
    cache.clear()
    found = settle(cache, teacher, at(500), TIMES, "int5_row")
    fmt = qgen.formats.get("int5_row")
    relative = lambda got, want: float((got - want).square().sum() / want.square().sum())  # noqa: E731
    for path, choice in found.items():
        assert choice.computed == pytest.approx(relative(computed[path], wanted[path]), rel=1e-4)
        assert choice.table == pytest.approx(relative(fmt.fake(wanted[path]), wanted[path]), rel=1e-4)
        assert choice.error == min(choice.computed, choice.table)
        assert (path in cache.curves) == (choice.table < choice.computed)
    assert 0 < len(cache.curves) < len(found), "both ways are taken"
    total = sum(choice.error for choice in found.values())
    assert total < min(sum(c.computed for c in found.values()), sum(c.table for c in found.values()))
    served = features(quantized, paths)
    for path in cache.curves:
        assert torch.allclose(served[path], fmt.fake(wanted[path]), atol=1e-6)


def test_other_timesteps_are_computed(quantized):
    plain = run(quantized, at(333))
    cache = cache_modulation(quantized, at(500))
    settle(cache, unet(), at(500), TIMES)
    assert cache.curves and 333 not in TIMES.tolist()
    assert torch.equal(run(quantized, at(333)), plain) and not torch.equal(
        run(quantized, at(TIMES[3])), run(unet(), at(TIMES[3]))
    )
