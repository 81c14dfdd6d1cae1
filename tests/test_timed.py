"""Tables as curves: nothing is lost by `factored`, and `curved` is the best that so few curves can do."""

import pytest
import torch

from qgen.timed import curved, factored

T, K, N = 12, 64, 48


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W, BIAS = random(N, K, seed=1) * 0.1, random(1, N, seed=2)
CENTRE, PATTERN, OTHER = (random(1, K, seed=s) for s in (3, 4, 5))
U, V = random(T, 1, seed=6), random(T, 1, seed=7)
SHIFTS = {  # the table, curves that move the input, curves of the bias beside these
    "constant": (CENTRE.expand(T, -1), 1, 0),
    "constant and a pattern": (CENTRE + U * PATTERN, 2, 0),
    "pattern alone": (U * PATTERN, 1, 1),
    "pattern and another": (U * PATTERN + V * OTHER, 2, 1),
}


def whole(made):
    """(shift (T, K) or None, bias (T, N)) that the curves stand for."""
    shift = None if made.shift is None else made.mix[:, made.mix.shape[1] - len(made.shift) :] @ made.shift.float()
    return shift, made.mix @ made.bias


def bias_of(shift, fixes=0.0):
    return (BIAS + fixes - (0.0 if shift is None else shift @ W.T)).expand(T, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHIFTS)
def test_curves_are_the_tables_again(name, dtype):
    table, moving, resting = SHIFTS[name]
    made = factored(table, bias_of, dtype, 4)
    assert made.mix.shape == (T, moving + resting) and made.mix.dtype == torch.float32 and made.mix.is_contiguous()
    assert made.shift.shape == (moving, K) and made.shift.dtype == dtype and made.bias.shape == (moving + resting, N)
    shift, bias = whole(made)
    # each of the stored rows is rounded once
    assert float((shift - table).norm() / table.norm()) < max(torch.finfo(dtype).eps / 2, 1e-6)
    torch.testing.assert_close(bias, bias_of(shift), atol=1e-5, rtol=1e-5)


def test_the_bias_belongs_to_the_shift_as_it_is_stored():
    """bfloat16 changes the shift by so much that the bias of the shift asked for would be far off."""
    table = 10 * CENTRE + U * PATTERN
    shift, bias = whole(factored(table, bias_of, torch.bfloat16, 4))
    off = float((bias_of(table) - bias_of(shift)).abs().max())
    assert off > 1e-3 and float((bias - bias_of(shift)).abs().max()) < 0.01 * off


def test_a_bias_that_moves_by_itself_has_its_own_curve():
    fixes = V * random(1, N, seed=8)
    made = factored(CENTRE + U * PATTERN, lambda shift: bias_of(shift, fixes), torch.float16, 4)
    assert made.mix.shape == (T, 3) and made.shift.shape == (2, K)
    shift, bias = whole(made)
    torch.testing.assert_close(bias, bias_of(shift, fixes), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shift, CENTRE + U * PATTERN, atol=1e-2, rtol=1e-3)


def test_without_a_shift_the_bias_alone_is_kept():
    fixes = V * random(1, N, seed=8)
    made = factored(None, lambda shift: bias_of(shift, fixes), torch.float16, 4)
    assert made.shift is None and made.mix.shape == (T, 2)
    torch.testing.assert_close(whole(made)[1], bias_of(None, fixes), atol=1e-5, rtol=1e-5)


def test_nothing_at_all_is_one_curve_of_zeros():
    made = factored(None, lambda shift: torch.zeros(T, N), torch.float16, 2)
    assert made.mix.shape == (T, 1) and made.bias.shape == (1, N) and not bool(whole(made)[1].any())
    made = factored(torch.zeros(T, K), lambda shift: torch.zeros(T, N), torch.float16, 2)
    assert made.mix.shape == (T, 1) and bool(torch.isfinite(made.mix).all())
    assert not any(bool(table.any()) for table in whole(made))


def test_tables_without_anything_in_common_stay_as_they_are():
    assert factored(random(T, K), bias_of, torch.float16, 4) is None
    assert factored(None, lambda shift: random(T, N), torch.float16, 2) is None


@pytest.mark.parametrize("curves", range(1, T + 1))
def test_curves_are_taken_where_they_need_less_memory(curves):
    table = random(T, curves) @ random(curves, K, seed=9)
    made = factored(table, lambda shift: -shift @ W.T, torch.float16, 4)
    before = T * (2 * K + 4 * N)
    after = 4 * T * curves + curves * (2 * K + 4 * N)
    assert (made is not None) == (after < before)
    if made is not None:
        assert made.mix.nbytes + made.shift.nbytes + made.bias.nbytes == after


def test_values_beyond_float16_are_clamped_and_the_bias_knows():
    table = CENTRE.sign() * 1e6 + 0 * U
    shift, bias = whole(factored(table, bias_of, torch.float16, 4))
    assert (
        bool(torch.isfinite(shift).all())
        and torch.equal(shift.sign(), table.sign())
        and float(shift.abs().max()) <= 65504
    )
    assert float((bias - bias_of(shift)).norm() / bias_of(shift).norm()) < 1e-5


# -- curved ------------------------------------------------------------------------------------------------------------


def deviations(table):
    return (table[:-1] - table[-1:]).double()


def test_no_curves_are_the_last_row_everywhere():
    table = random(T, K)
    assert torch.equal(curved(table, torch.ones(T - 1), 0), table[-1:].expand(T, -1))


@pytest.mark.parametrize("curves", [T - 1, T + 5])
def test_as_many_curves_as_bins_are_the_table(curves):
    table, weights = random(T, K), random(T - 1, seed=3).abs() + 0.01
    made = curved(table, weights, curves)
    assert made.dtype == table.dtype and torch.equal(made[-1], table[-1])
    torch.testing.assert_close(made, table, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("curves", [1, 2])
def test_few_curves_are_the_best_in_weighted_squares(curves):
    """The rows projected on the leading eigenvectors of Σ_b w_b r_b r_bᵀ, which is how least squares puts it."""
    table, weights = random(T, K), random(T - 1, seed=3).abs() * 10
    rows = deviations(table)
    v = torch.linalg.eigh(rows.T @ (weights.double()[:, None] * rows)).eigenvectors[:, -curves:]
    want = table[-1] + (rows @ v @ v.T).float()
    made = curved(table, weights, curves)
    torch.testing.assert_close(made[:-1], want, atol=1e-5, rtol=1e-4)
    assert torch.equal(made[-1], table[-1]) and torch.linalg.matrix_rank(deviations(made), atol=1e-4) == curves

    def lost(t):
        return float((weights[:, None] * (t[:-1] - table[:-1]).square()).sum())

    even = curved(table, torch.ones(T - 1), curves)  # the best of another question
    assert lost(made) < lost(even) and lost(made) < lost(curved(table, weights, curves - 1))


def test_bins_without_data_lie_on_the_last_row_and_pull_at_nothing():
    table, weights = random(T, K), torch.ones(T - 1)
    weights[[0, 4]] = 0
    wild = table.clone()
    wild[[0, 4]] = 1e4
    for curves in (1, T):
        made, other = curved(table, weights, curves), curved(wild, weights, curves)
        assert bool(torch.isfinite(other).all()) and torch.equal(made[[0, 4]], table[-1:].expand(2, -1))
        torch.testing.assert_close(made, other, atol=1e-5, rtol=1e-5)
    assert torch.equal(curved(table, torch.zeros(T - 1), 3), table[-1:].expand(T, -1))


def test_counts_are_weights_too():
    table, counts = random(T, K), torch.arange(T - 1)
    torch.testing.assert_close(curved(table, counts, 1), curved(table, counts / 7, 1), atol=1e-5, rtol=1e-5)


def test_sixteen_bits_hold_the_rows_of_what_they_hold_the_table_of():
    """Columns of norm 1 would make the rows of a constant table √T times as large as it is."""
    table = torch.full((33, K), -40000.0)
    made = factored(table, lambda shift: torch.full((33, N), 40000.0), torch.float16, 2)
    shift, _ = whole(made)
    torch.testing.assert_close(shift, table, rtol=1e-3, atol=0)
    torch.testing.assert_close(made.mix @ made.bias.half().float(), torch.full((33, N), 40000.0), rtol=2e-3, atol=0)
