"""Paths: the same tokens at every step, whatever the order of calls, and nothing of a token that was not kept whole."""

import random

import pytest
import torch

from qgen.calibration.base import Moment
from qgen.calibration.paths import Paths

K, STEPS, TOKENS = 5, 6, 40


def call(sample, step, held=False, branch="", tokens=TOKENS):
    """Rows that tell where they come from: sample, place in the call, step, branch."""
    x = torch.zeros(tokens, K)
    x[:, 0], x[:, 1], x[:, 2], x[:, 3] = sample, torch.arange(tokens), step, len(branch)
    return x, Moment(sample, step, 1000.0 - 100 * step, branch=branch, held=held)


def calls(samples=4, steps=STEPS, **how):
    return [call(s, i, held=s == samples - 1, **how) for s in range(samples) for i in range(steps)]


def fed(parts, rows=120, seed=0):
    paths = Paths(rows, seed)
    for x, moment in parts:
        paths.update(x, moment)
    return paths


def sorted_by_step(whole):
    """Rows and timesteps, each token's in the order of its steps: which token comes first is part of the sample."""
    x, t = whole
    order = t.argsort(dim=1, descending=True)
    return x.gather(1, order[..., None].expand_as(x)), t.gather(1, order)


def test_a_path_is_one_token_at_all_steps():
    x, t = sorted_by_step(fed(calls()).whole())
    assert x.shape[1:] == (STEPS, K) and t.shape == x.shape[:2] and x.dtype == t.dtype == torch.float32
    for column in (0, 1, 3):
        assert torch.equal(x[..., column], x[:, :1, column].expand(-1, STEPS))
    assert torch.equal(x[..., 2], torch.arange(float(STEPS)).expand(len(x), -1))
    assert torch.equal(t, 1000 - 100 * x[..., 2])  # the timesteps are those of the rows
    assert len({tuple(token) for token in x[:, 0, :2].tolist()}) == len(x)


def test_tokens_of_both_sides_are_there_and_as_many_as_fit():
    x, _ = fed(calls(), rows=120).whole()
    held = x[:, 0, 0] == 3
    assert int((~held).sum()) == 120 // STEPS and int(held.sum()) == 30 // STEPS


def test_the_sample_is_uniform_over_samples_and_places():
    x, _ = fed(calls(samples=6, tokens=200), rows=300 * STEPS).whole()
    fitted = x[x[:, 0, 0] < 5]
    assert torch.histc(fitted[:, 0, 0], 5, 0, 4).min() > 35  # 60 expected, deviation 6
    assert abs(float(fitted[:, 0, 1].mean()) - 99.5) < 15


def test_any_order_and_any_halves_give_the_same():
    parts = calls()
    want = sorted_by_step(fed(parts).whole())
    for seed in range(6):
        mixed = random.Random(seed).sample(parts, len(parts))
        left, right = fed(mixed[:9]), fed(mixed[9:])
        right.merge(left)
        for found in (fed(mixed), right):
            assert all(torch.equal(a, b) for a, b in zip(want, sorted_by_step(found.whole()), strict=True))
    assert not torch.equal(want[0], sorted_by_step(fed(parts, seed=1).whole())[0])


def test_tokens_that_were_not_kept_whole_are_left_out():
    """64 rows are ten tokens of six and four of an eleventh, 16 held ones are two tokens and four of a third."""
    paths = fed(calls(), rows=64)
    assert len(paths.result(False)) == 64 and len(paths.result(True)) == 16
    x, t = paths.whole()
    assert x.shape == (12, STEPS, K) and bool((x[..., 0:2] == x[:, :1, 0:2]).all())
    assert all(len(set(steps)) == STEPS for steps in t.tolist())


def test_a_prompt_with_fewer_calls_is_left_out():
    parts = [*calls(), *(call(9, step) for step in range(STEPS - 2))]
    x, _ = fed(parts, rows=10_000).whole()
    assert set(x[..., 0].unique().tolist()) == {0, 1, 2, 3} and len(x) == 4 * TOKENS


def test_halves_of_guidance_are_tokens_of_their_own():
    parts = [call(s, i, branch=b) for s in range(2) for i in range(STEPS) for b in ("cond", "uncond")]
    x, _ = fed(parts, rows=10_000).whole()
    assert x.shape == (4 * TOKENS, STEPS, K) and bool((x[..., 3] == x[:, :1, 3]).all())


def test_one_sample_that_is_held_out_by_step_has_whole_paths():
    parts = [call(0, i, held=i % 3 == 2) for i in range(STEPS)]
    x, t = fed(parts, rows=10_000).whole()
    assert x.shape == (TOKENS, STEPS, K) and len(t[0].unique()) == STEPS


@pytest.mark.parametrize("parts", [[], calls(steps=1), [call(0, 0)]])
def test_a_single_step_has_no_paths(parts):
    assert fed(parts).whole() is None


def test_rows_and_bytes_stay_within_what_was_planned():
    paths = Paths(50, itemsize=2)
    for x, moment in calls(samples=8):
        paths.update(x.bfloat16(), moment)
        sizes = [0 if kept is None else len(kept[1]) for kept in paths._kept.values()]
        assert sizes[0] <= 50 and sizes[1] <= 12
    held = sum(t.nbytes for kept in paths._kept.values() for t in kept)
    assert held <= paths.nbytes(K) <= 1.1 * held
    assert paths.whole()[0].dtype == torch.float32
