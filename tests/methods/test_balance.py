"""Balance: its model of rounding errors against real rounding, and that it lowers the error of the output."""

from dataclasses import replace

import pytest
import torch

from qgen import formats
from qgen.methods.balance import Balance, noise_of, ranges
from qgen.methods.base import Stats
from qgen.methods.lowrank import LowRank
from qgen.methods.smooth import Smooth
from qgen.recipe import Spec
from qgen.site import Draft, Site

N, K = 96, 192


def layer(weight="int4_g64", act="uint4_g64", k=K):
    """A draft whose input has channels of very different size, and its statistics."""
    g = torch.Generator().manual_seed(0)
    size = torch.exp(1.5 * torch.randn(k, generator=g))
    x = (torch.randn(700, k, generator=g) + 0.5) * size
    site = Site("a.b", "linear", "a", 0, "x", (N, k))
    draft = Draft((site,), Spec(weight, act, (Balance(), LowRank(8))), torch.randn(N, k, generator=g) / size.sqrt())
    stats = Stats(fit=x[:500], held=x[500:], gram=x.T @ x / len(x), absmax=x.abs().amax(0), absmean=x.abs().mean(0))
    return draft, stats


def error(draft, stats):
    finished = LowRank(8, rounds=0).refine(draft, stats)
    return stats.judge.error(finished)


@pytest.mark.parametrize(
    ("weight", "act"),
    [
        ("int4_g64", "uint4_g64"),
        ("int4_g64", "int4_g64"),
        ("nvfp4", "nvfp4_dynamic"),
        ("int4_s8_g64", "int8_row"),
        ("int4_g64", None),
    ],
)
def test_lowers_the_error_below_none_and_a_grid(weight, act):
    draft, stats = layer(weight, act)
    found = Balance().refine(draft, stats)
    grid = Smooth(alphas=(0.5,)).refine(draft, stats)
    assert found.smooth is not None and found.qweight is None and found.up is None
    assert error(found, stats) < error(draft, stats)
    assert error(found, stats) < 1.01 * error(grid, stats)


def test_helps_clearly_where_both_sides_are_rounded_to_four_bits():
    draft, stats = layer()
    assert error(Balance().refine(draft, stats), stats) < 0.93 * error(Smooth().refine(draft, stats), stats)


@pytest.mark.parametrize("name", ["int4_g64", "uint4_g64", "int8_g64", "nvfp4", "mxfp4", "fp8_e4m3_row"])
def test_noise_is_what_rounding_adds(name):
    fmt = formats.get(name)
    x = 3 * torch.randn(64, 1024, generator=torch.Generator().manual_seed(5))
    modelled = noise_of(name) * float(ranges(x, fmt).square().mean())
    assert modelled == pytest.approx(float((fmt.fake(x) - x).square().mean()), rel=0.15)


def test_ranges_by_hand():
    x = torch.tensor([[1.0, -3.0] + [0.0] * 62 + [2.0] * 64])
    assert ranges(x, formats.get("int4_g64")).tolist() == [[3.0, 2.0]]
    assert ranges(x, formats.get("uint4_g64")).tolist() == [[4.0, 0.0]]


def test_never_worse_than_no_smoothing_on_held_out_rows():
    draft, stats = layer()
    hurt = replace(stats, absmax=torch.ones(K))  # a start that knows nothing
    found = Balance(steps=1).refine(draft, hurt)
    assert error(found, stats) <= error(draft, stats)


def test_padded_rows_hadamard_and_dead_inputs():
    draft, stats = layer(k=200)
    assert Balance().refine(draft, stats).smooth.shape == (200,)
    draft, stats = layer()
    assert error(Balance().refine(replace(draft, hadamard=64), stats), stats) < 1
    nothing = Stats(fit=torch.zeros(50, K), held=torch.zeros(9, K), absmax=torch.zeros(K), absmean=torch.zeros(K))
    assert Balance().refine(draft, nothing).qweight is None


def test_runs_under_no_grad_and_inference_mode_and_is_deterministic():
    draft, stats = layer()
    with torch.inference_mode():
        x = stats.fit * 1.0
        inside = Balance().refine(draft, replace(stats, fit=x, held=stats.held * 1.0))
    with torch.no_grad():
        again = Balance().refine(draft, stats)
    assert torch.equal(inside.smooth, again.smooth) and not again.smooth.requires_grad
