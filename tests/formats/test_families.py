"""What each family of formats promises: its grid by hand, its closed form, its optimum by brute force, its gain over what it refines."""

import itertools
import math

import numpy as np
import pytest
import torch

from qgen import formats
from qgen.formats import QTensor, packing
from qgen.formats.bitmod import BitMoD
from qgen.formats.lut import lloyd
from qgen.formats.minifloat import E3M2
from qgen.formats.nf4 import BNB_FP4, NF4
from qgen.formats.nf4_dq import collect, spread
from qgen.formats.planes import switch
from qgen.formats.powers import APOT3, APOT4, APOT5, POT3, POT4
from qgen.formats.vq import kmeans


def gaussian(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mse(name, x):
    return float((formats.get(name).fake(x) - x).square().mean())


def block_errors(fmt, x, size=None):
    return (fmt.fake(x) - x).square().unflatten(-1, (-1, size or fmt.block)).sum(-1)


# -- errors on Gaussian data, as published and as computed by others --------------------------------------------------
@pytest.mark.parametrize(
    "name, want",
    [
        ("nf4_g64", 0.00844),
        ("bitmod4_g128", 0.00956),
        ("nvfp4", 0.00905),
        ("nvfp4_46", 0.00756),
        ("mxfp4", 0.01313),
        ("mxfp4_best", 0.01239),
        ("fp4_e2m1_g128", 0.01182),
        ("int4_g128", 0.01369),
        ("uint4_g64", 0.00801),
    ],
)
def test_mean_square_error_of_four_bits(name, want):
    """Mean squares of N(0, 1) within 2 % of values found by independent implementations."""
    assert mse(name, gaussian(128, 4096)) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
    "name, db",
    [("nvfp4_row", 20.43), ("nf4_g64", 20.74), ("nf4_g64_dq", 20.73), ("int4_s8_g64", 19.68), ("nvfp4_46", 21.21)],
)
def test_sqnr_of_four_bits(name, db):
    assert -10 * math.log10(mse(name, gaussian(256, 4096))) == pytest.approx(db, abs=0.05)


@pytest.mark.parametrize("name", ["fp4_e1m2_g128", "fp4_e2m1_g128", "fp4_e3m0_g128"])
def test_four_bits_of_floats_are_fifteen_values(name):
    assert len({v + 0.0 for v in formats.get(name).element.values}) == 15
    fmt, x = formats.get(name), gaussian(4, 4096)
    units = fmt.blocks(fmt.fake(x)) / fmt.step(fmt.quantize(x).scales, None)[..., None]
    assert len((units * 64).round().unique()) == 15


def test_e1m2_is_int4():
    """The same values from the same data; only the codes are spelt otherwise."""
    x = gaussian(64, 512)
    one, other = (formats.get(name).fake(x) for name in ("fp4_e1m2_row", "int4_row"))
    assert torch.allclose(one, other, rtol=3e-7, atol=0)  # scales are amax / 1.75 and amax / 7: one rounding apart


@pytest.mark.parametrize("stem, bits", [("int{}_g64", range(3, 9)), ("planes{}_g64", range(2, 9)), ("power{}_row", (3, 4, 6, 8)),
                                        ("apot{}_g64", (3, 4, 5)), ("lut{}_row", (2, 3, 4))])  # fmt: skip
def test_more_bits_are_better(stem, bits):
    errors = [mse(stem.format(b), gaussian(16, 1024)) for b in bits]
    assert all(b < a / 1.5 for a, b in itertools.pairwise(errors))


# -- NVFP4 ------------------------------------------------------------------------------------------------------------
def test_a_scale_per_row_serves_rows_of_different_size():
    x = gaussian(8, 256) * torch.logspace(-6, 6, 8)[:, None]
    tensor, row = (formats.get(name).quantize(x) for name in ("nvfp4", "nvfp4_row"))
    assert row.global_scale.shape == (8, 1) and row.global_scale.dtype == torch.float32
    assert torch.allclose(row.global_scale[:, 0], x.abs().amax(1) / 2688) and (row.scales.float().amax(1) == 448).all()
    assert not tensor.dequantize()[0].any()  # one scale for all leaves nothing of the smallest row
    assert ((row.dequantize() - x).norm(dim=1) / x.norm(dim=1)).max() < 0.12
    one = formats.get("nvfp4").quantize(x[3:4])
    assert torch.equal(one.codes, row.codes[3:4]) and torch.equal(one.dequantize(), row.dequantize()[3:4])


def test_four_over_six_beats_either_choice_in_every_block():
    x = gaussian(64, 512)
    fmt = formats.get("nvfp4_46")
    q = fmt.quantize(x)
    amax = fmt.blocks(x).abs().amax(-1)
    forced = []
    for target in (6, 4):
        scales = (amax / target / q.global_scale).clamp(max=448).to(torch.float8_e4m3fn)
        like = QTensor(None, scales, q.global_scale, None, fmt.name)
        forced.append((fmt.quantize(x, like=like).dequantize() - x).square().unflatten(-1, (-1, 16)).sum(-1))
    assert torch.equal(block_errors(fmt, x), torch.minimum(*forced))
    assert mse("nvfp4_46", x) < 0.9 * mse("nvfp4", x) and float(q.scales.float().max()) <= 384


@pytest.mark.parametrize("kind", ["gauss", "laplace", "uniform"])
def test_four_over_six_is_nearer_than_six_alone_under_the_same_scale_of_the_tensor(kind):
    x = gaussian(64, 1024)
    if kind == "uniform":
        x = torch.erf(x / 2**0.5)
    elif kind == "laplace":
        u = torch.erf(x / 2**0.5)
        x = -u.sign() * (1 - u.abs()).clamp_min(1e-6).log()
    fmt = formats.get("nvfp4_46")
    q = fmt.quantize(x)
    six = (fmt.blocks(x).abs().amax(-1) / 6 / q.global_scale).clamp(max=448).to(torch.float8_e4m3fn)
    plain = fmt.quantize(x, like=QTensor(None, six, q.global_scale, None, fmt.name)).dequantize()
    assert float((q.dequantize() - x).square().sum()) <= 0.95 * float((plain - x).square().sum())


# -- MX ---------------------------------------------------------------------------------------------------------------
def test_the_block_of_the_card():
    """x = -16 … 15: the scale is 4; ±14 is a tie of 12 and 16 and goes to the even code, 16."""
    q = formats.get("mxfp4").quantize(torch.arange(-16.0, 16)[None])
    assert q.scales.tolist() == [[0x81]]
    assert q.dequantize()[0, [0, 1, 2, 3, 4, 28, 29, 30, 31]].tolist() == [-16, -16, -16, -12, -12, 12, 12, 16, 16]


@pytest.mark.parametrize("family", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8"])
def test_ways_to_choose_the_exponent(family):
    x = gaussian(64, 1024) * 2.0 ** torch.arange(64)[:, None]
    floor, up, best = (formats.get(family + mode) for mode in ("", "_rceil", "_best"))
    element, amax = floor.element, floor.blocks(x).abs().amax(-1)
    step = up.step(up.quantize(x).scales, None)
    assert (amax <= element.max * step).all() and (amax > element.max * step / 2).all()  # never clips, never wastes
    emax = math.floor(math.log2(element.max))
    assert torch.equal(floor.step(floor.quantize(x).scales, None).log2(), amax.log2().floor() - emax)
    above = QTensor(None, floor.quantize(x).scales + 1, None, None, family)
    other = (floor.quantize(x, like=above).dequantize() - x).square().unflatten(-1, (-1, 32)).sum(-1)
    assert torch.equal(block_errors(best, x), torch.minimum(block_errors(floor, x), other))


def test_even_turns_at_the_significand_that_rounds_up():
    for name, turn in (("mxfp4_even", 1.75), ("mxfp8_e4m3_even", 1.9375)):
        x = torch.zeros(2, 32)
        x[:, 0] = torch.tensor([np.nextafter(np.float32(turn), np.float32(0)), turn])
        below, at = formats.get(name).quantize(x).scales[:, 0].tolist()
        assert at == below + 1


# -- power-of-two scales of ZeroQuant-FP ------------------------------------------------------------------------------
def test_scales_that_are_powers_of_two():
    x = gaussian(32, 1024) * torch.rand(32, 8).exp().repeat_interleave(128, 1)
    m1, m2, free = (formats.get(f"fp4_e2m1_{kind}g128") for kind in ("m1_", "m2_", ""))
    ideal = m1.blocks(x).abs().amax(-1) / 6
    assert torch.equal(m1.step(m1.quantize(x).scales, None), torch.exp2(ideal.log2().ceil()))
    q = m2.quantize(x)
    step = m2.step(q.scales, q.global_scale)
    assert torch.equal(q.global_scale, ideal.amax(-1, keepdim=True)) and q.scales.dtype == torch.uint8
    assert (step >= ideal).all() and (step < 2 * ideal).all() and (step == q.global_scale).any(-1).all()
    errors = [mse(fmt.name, x) for fmt in (free, m2, m1)]
    assert errors[0] < errors[1] < 1.35 * errors[0] and errors[2] < 1.4 * errors[0]


def test_a_row_of_equal_blocks_keeps_its_scale_in_m2_and_not_in_m1():
    x = gaussian(1, 128).repeat(16, 8)
    assert mse("fp4_e2m1_m2_g128", x) == pytest.approx(mse("fp4_e2m1_g128", x), rel=0.02)
    assert mse("fp4_e2m1_m2_g128", x) <= mse("fp4_e2m1_m1_g128", x)


# -- tables -----------------------------------------------------------------------------------------------------------
def test_nf4_is_made_of_quantiles():
    from scipy.stats import norm

    delta = 0.9677083
    positive = norm.ppf(np.linspace(delta, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(delta, 0.5, 8)[:-1])
    want = np.sort(np.concatenate([positive, [0], negative])) / positive.max()
    assert np.allclose(NF4.values, want, atol=2e-6)


@pytest.mark.parametrize("element", [NF4, BNB_FP4], ids=lambda e: e.name)
def test_midpoints_take_the_lower_value(element):
    grid = torch.tensor(sorted({v + 0.0 for v in element.values}))
    mids = (grid[1:] + grid[:-1]) / 2
    assert torch.equal(element.round(mids), grid[:-1])
    assert torch.equal(element.round(torch.nextafter(mids, torch.tensor(9.0))), grid[1:])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, 5.0, -5.0])
    assert element.round(special).tolist() == [1, -1, 1, 0, 0, 0, 1, -1]


def test_cutting_rows_out_of_double_quantized_weights():
    """Rows 3 … 7 of a tensor whose chunks begin inside rows: what was kept per row is enough."""
    x = gaussian(40, 64 * 30).abs() * torch.rand(40, 1)
    q = formats.get("nf4_g64_dq").quantize(x)
    part = QTensor(q.codes[3:8], q.scales[3:8], q.global_scale[3:8], None, q.format)
    assert torch.equal(part.dequantize(), q.dequantize()[3:8])
    assert mse("nf4_g64_dq", x) < 1.02 * mse("nf4_g64", x)


@pytest.mark.parametrize("rows, groups", [(1, 1), (7, 1), (256, 2), (5, 255), (5, 256), (5, 257), (9, 700), (300, 48)])
def test_what_chunks_share_comes_back(rows, groups):
    nested = torch.rand(-(-rows * groups // 256))
    kept = spread(torch.tensor(0.5), nested, torch.Size([rows, groups]))
    assert kept.shape == formats.get("nf4_g64_dq").shapes(rows, 64 * groups)["global_scale"][0]
    offset, back = collect(kept, groups)
    assert offset == 0.5 and torch.equal(back, nested)
    flat = torch.repeat_interleave(nested, 256)[: rows * groups].view(rows, groups)
    step = formats.get("nf4_g64_dq").step(torch.full((rows, groups), 255, dtype=torch.uint8), kept)
    assert torch.equal(step, flat + 0.5)  # code 255 is 1


def test_powers_of_two_and_their_sums():
    assert sorted(set(map(abs, POT4.values))) == [0, *(2.0**-k for k in range(6, -1, -1))]
    assert sorted(set(map(abs, POT3.values))) == [0, 0.25, 0.5, 1]
    assert np.allclose(APOT3.values[:4], [0, 0.25, 0.5, 1])
    assert np.allclose(np.divide(APOT4.values[:8], 5), [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    five = [
        0,
        1 / 48,
        1 / 24,
        1 / 16,
        1 / 12,
        1 / 8,
        1 / 6,
        3 / 16,
        1 / 4,
        1 / 3,
        3 / 8,
        1 / 2,
        2 / 3,
        11 / 16,
        3 / 4,
        1,
    ]
    assert np.allclose(np.divide(APOT5.values[:16], 24), five)
    x = gaussian(1000)
    for element in (POT4, APOT4, APOT5):
        grid = torch.tensor(element.values)
        brute = grid[(x[:, None] - grid).abs().argmin(1)]
        assert torch.equal(element.round(x).abs(), brute.abs()) and element.round(torch.tensor(-99.0)) == element.min
    assert mse("apot4_g64", gaussian(64, 512)) < mse("pot4_g64", gaussian(64, 512)) / 3


# -- ternary and binary -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["ternary_row", "binary_row"])
def test_the_scale_of_least_squares(name):
    """No scale of ten thousand does better, and no code does, by trying all of them."""
    x = gaussian(12, 8)
    fmt = formats.get(name)
    q = fmt.quantize(x)
    error = (q.dequantize() - x).square().sum(-1).double()
    levels = [-1.0, 0.0, 1.0] if name == "ternary_row" else [-1.0, 1.0]
    codes = torch.tensor(list(itertools.product(levels, repeat=8)), dtype=torch.float64)  # all codes there are
    best = torch.where(codes.any(1), (x.double() @ codes.T).square() / codes.square().sum(1).clamp(min=1), 0).amax(1)
    assert torch.allclose(error, x.double().square().sum(-1) - best, rtol=1e-5)
    assert set(fmt.element.decode(fmt.unpack(q.codes)).unique().tolist()) == set(levels)


def test_ternary_takes_two_bits_and_binary_one():
    x = torch.tensor([[1.0, -1, 0, 0.1, -0.2, 1, 1, -1]])
    assert formats.get("ternary_row").quantize(x).codes.tolist() == [[0b00_00_11_01, 0b11_01_01_00]]
    assert formats.get("binary_row").quantize(x).codes.tolist() == [[0b01101101]]


def test_gaussian_optima():
    """Binary: 1 - 2/π; ternary: 0.190, the Lloyd quantizer of three levels."""
    assert mse("binary_row", gaussian(32, 4096)) == pytest.approx(1 - 2 / math.pi, rel=0.01)
    assert mse("ternary_row", gaussian(32, 4096)) == pytest.approx(0.190, rel=0.01)


# -- logarithms -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("kind, steps", [("log2", 1), ("logsqrt2", 2)])
def test_logarithmic_codes_are_the_closed_form(kind, steps, bits):
    p = torch.cat([torch.rand(500_000), torch.exp2(-40 * torch.rand(500_000)), torch.tensor([1e-45, 1e-38, 1.0])])
    fmt = formats.get(f"{kind}_{bits}_row")
    last = 2**bits - 1
    want = np.minimum(np.rint(-steps * np.log2(p.double().numpy())), last)
    codes = fmt.element.encode(p)
    assert np.array_equal(codes.numpy(), want.astype(np.uint8))
    values = np.where(want < last, 2.0 ** (-want / steps), 0)
    assert np.allclose(fmt.element.decode(codes).numpy(), values, rtol=1e-7, atol=0)
    assert fmt.element.round(torch.tensor([0.0, -0.0, -1.0, 7.0, torch.inf])).tolist() == [0, 0, 0, 1, 1]


def test_log_sqrt2_suits_softmax():
    """Error of P V with probabilities in four bits, sharp softmax: log-√2 beats uniform, which beats log2."""
    p = (gaussian(64, 128) * 2.5).softmax(-1)
    v = gaussian(128, 32, seed=6)
    names = ("logsqrt2_4_row", "log2_4_row", "uint4p_g128")
    root, two, uniform = ((formats.get(n).fake(p) @ v - p @ v).norm() / (p @ v).norm() for n in names)
    assert root <= 0.6 * two and root <= 0.8 * uniform


def test_masked_probabilities_stay_zero():
    p = torch.tensor([[0.7, 0.3, 0.0, 1e-9] * 2])
    assert formats.get("logsqrt2_4_row").fake(p)[0, 2:4].tolist() == [0, 0]


# -- power-exponent ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_power_codes_are_the_closed_form(bits):
    x = gaussian(32, 512).sign() * gaussian(32, 512).abs() ** 1.5
    q = formats.get(f"power{bits}_row").quantize(x)
    a, top = float(q.global_scale), 2 ** (bits - 1) - 1
    unit = x.double().numpy() / np.abs(x.double().numpy()).max(-1, keepdims=True)
    codes = np.rint(top * np.sign(unit) * np.abs(unit) ** a)
    fmt = formats.get(q.format)
    mine = fmt.element.decode(fmt.unpack(q.codes)).numpy()
    assert (mine != codes).mean() < 1e-4 and np.abs(
        mine - codes
    ).max() <= 1  # float32 powers at the border of two codes
    want = np.sign(mine) * np.abs(mine / top) ** (1 / a) * np.abs(x.numpy()).max(-1, keepdims=True)
    assert np.allclose(q.dequantize().numpy(), want, rtol=1e-5)
    plain = QTensor(None, q.scales, torch.tensor(1.0), None, q.format)
    assert mse(q.format, x) <= float((fmt.quantize(x, like=plain).dequantize() - x).square().mean())


def test_the_exponent_follows_the_data():
    flat, heavy = torch.rand(16, 512) * 2 - 1, gaussian(16, 512) ** 5
    a = [float(formats.get("power4_row").quantize(x).global_scale) for x in (flat, gaussian(16, 512), heavy)]
    assert a[0] == pytest.approx(1) and a[0] > a[1] > a[2]


# -- BitMoD -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, plain, gain", [("bitmod4_g128", "fp4_e2m1_g128", 0.88), ("bitmod3_g128", "int3_g128", 0.75)]
)
def test_bitmod_gains(name, plain, gain):
    x = gaussian(64, 1024)
    assert mse(name, x) <= gain * mse(plain, x)
    if name == "bitmod4_g128":
        assert (block_errors(formats.get(name), x) <= block_errors(formats.get(plain), x)).all()


@pytest.mark.parametrize("bits, specials", [(4, [5.0, -5.0, 8.0, -8.0]), (3, [3.0, -3.0, 6.0, -6.0])])
def test_bitmod_takes_the_best_of_four_tables(bits, specials):
    fmt: BitMoD = formats.get(f"bitmod{bits}_g32")
    base = [0, 0.5, 1, 1.5, 2, 3, 4, 6] if bits == 4 else [0, 1, 2, 4]
    x = gaussian(32, 256)
    q = fmt.quantize(x)
    errors = []
    for special in specials:
        table = torch.tensor([*base, *(-v for v in base), special])
        scale = (fmt.blocks(x).abs().amax(-1) / table.abs().max()).bfloat16().float()[..., None]
        nearest = table[(fmt.blocks(x) / scale)[..., None].sub(table).abs().argmin(-1)] * scale
        errors.append((nearest - fmt.blocks(x)).square().sum(-1))
    assert torch.allclose(block_errors(fmt, x), torch.stack(errors).amin(0), rtol=1e-5)
    chosen = packing.unpack(q.zero, 2)
    assert (
        q.zero.shape == (32, 2)
        and torch.equal(chosen.long(), torch.stack(errors).argmin(0))
        and len(chosen.unique()) == 4
    )


# -- learned codebooks ------------------------------------------------------------------------------------------------
def test_every_step_of_lloyd_lowers_the_error():
    x = gaussian(8, 1024)

    def error(table):
        return (x[..., None] - table[:, None]).abs().amin(-1).square().sum(-1)

    errors = [error(lloyd(x, 3, steps=s)) for s in (0, 1, 2, 5, 20)]
    assert all((b <= a + 1e-3).all() for a, b in itertools.pairwise(errors))
    x = gaussian(1, 65536)
    assert float(error(lloyd(x, 3, steps=100)).sum()) / x.numel() == pytest.approx(
        0.0345, rel=0.03
    )  # Lloyd-Max, 8 levels


def test_lloyd_finds_few_values_exactly_and_heeds_importance():
    values = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    x = values[torch.randint(0, 4, (6, 256))]
    assert torch.equal(formats.get("lut2_row").fake(x).half(), x.half())
    x, importance = gaussian(4, 512), torch.ones(512)
    importance[:32] = 1000
    plain, weighted = ((x[..., None] - lloyd(x, 2, w)[:, None]).abs().amin(-1).square() for w in (None, importance))
    assert weighted[:, :32].sum() < plain[:, :32].sum()


def test_tables_are_nearest_and_beat_other_four_bits():
    x = gaussian(16, 2048)
    q = formats.get("lut4_row").quantize(x)
    table = q.scales.float() * q.global_scale
    nearest = (x[..., None] - table[:, None]).abs().amin(-1)
    assert torch.allclose((q.dequantize() - x).abs(), nearest, atol=1e-6)
    assert mse("lut4_row", x) < 0.55 * mse("int4_row", x)


@pytest.mark.parametrize("name", ["vq1_d8", "vq2_d2", "vq2_d4", "vq2_d8", "vq3_d2", "vq4_d2", "vq4_d4"])
def test_vectors_are_entries_of_the_codebook(name):
    fmt = formats.get(name)
    x = gaussian(64, 192)
    q = fmt.quantize(x)
    codes = fmt.unpack(q.codes).long().view(-1, fmt.stages)
    left = (x / x.square().mean(1, keepdim=True).sqrt()).reshape(-1, fmt.dims)
    for stage, book in enumerate(q.global_scale.split(1 << fmt.width)):
        distance = torch.cdist(left.double(), book.double())
        mine = distance.gather(1, codes[:, stage, None])[:, 0]
        assert torch.allclose(mine, distance.amin(1), atol=1e-5)  # the nearest entry, of two equally near any
        left = left - book[codes[:, stage]]
    assert torch.allclose(
        (x - q.dequantize()).view(-1, fmt.dims), left * q.scales.repeat_interleave(192 // fmt.dims, 0), atol=1e-5
    )
    assert q.codes.numel() * 8 == fmt.bits * x.numel() and q.scales.shape == (64, 1)
    again = fmt.quantize(x)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.global_scale, q.global_scale)


def test_more_dimensions_are_better_at_equal_bits():
    x = gaussian(128, 512)
    errors = [mse(name, x) for name in ("uint2_g128", "vq2_d2", "vq2_d4")]
    assert errors[2] < errors[1] < errors[0] and errors[1] == pytest.approx(0.106, rel=0.04)


def test_kmeans_lowers_the_error_heeds_importance_and_leaves_no_entry_idle():
    vectors = gaussian(4000, 2)

    def error(book, weight=None):
        distance = torch.cdist(vectors, book).amin(1).square()
        return float((distance if weight is None else distance * weight).sum())

    errors = [error(kmeans(vectors, 16, steps=s)) for s in (0, 1, 3, 20)]
    assert errors == sorted(errors, reverse=True)
    weight = (vectors[:, 0] > 1).float() * 50 + 0.1
    assert error(kmeans(vectors, 16, weight), weight) < error(kmeans(vectors, 16), weight)
    clumps = torch.cat([torch.zeros(3000, 2), gaussian(20, 2) + 5])  # all sixteen start in one place
    assert len(torch.cdist(clumps, kmeans(clumps, 16)).argmin(1).unique()) >= 15
    few = gaussian(5, 4)
    assert torch.cdist(few, kmeans(few, 16)).amin(1).max() < 1e-5  # fewer vectors than entries


def test_vectors_need_whole_bytes():
    with pytest.raises(ValueError, match="vq3_d2 needs K divisible by 8, found K=36"):
        formats.get("vq3_d2").quantize(gaussian(2, 36))


# -- bit planes, FP6 --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["g64", "row"])
def test_fewer_bits_are_the_first_planes(suffix):
    x = torch.cat(
        [gaussian(16, 256), (torch.arange(512) % 257 - 128).view(2, 256) / 128]
    )  # with the borders of all cells
    q = formats.get(f"planes8_{suffix}").quantize(x)
    for bits in range(1, 9):
        direct, part = formats.get(f"planes{bits}_{suffix}").quantize(x), switch(q, bits)
        assert torch.equal(part.codes, direct.codes) and torch.equal(part.dequantize(), direct.dequantize())
        assert part.codes.data_ptr() == q.codes.data_ptr() and part.shape == x.shape
        cell = formats.get(f"planes{bits}_{suffix}").blocks(x).abs().amax(-1, keepdim=True) / 2**bits
        assert (
            formats.get("planes8_" + suffix).blocks((part.dequantize() - x).abs()) <= cell * (1 + 2**bits / 256)
        ).all()
    assert torch.equal(switch(switch(q, 5), 3).codes, switch(q, 3).codes)


def test_the_bytes_of_planes():
    x = torch.tensor([[-1.0, -1, 1, 1, 1, 1, 1, 0.1]])
    assert formats.get("planes1_row").quantize(x).codes.tolist() == [[0b11111100]]
    assert formats.get("planes2_row").quantize(x).codes.tolist() == [[0b11111100, 0b01111100]]


def test_switch_refuses_what_has_no_planes():
    with pytest.raises(ValueError, match=r"at least as many bit planes .* found int4_g64"):
        switch(formats.get("int4_g64").quantize(gaussian(2, 64)), 2)
    with pytest.raises(ValueError, match="switching to 5 bits"):
        switch(formats.get("planes4_g64").quantize(gaussian(2, 64)), 5)


def test_fp6_in_four_and_two():
    x = gaussian(32, 4096)
    planes, stream = (formats.get(name).quantize(x) for name in ("fp6_42_row", "fp6_e3m2_row"))
    codes = packing.unpack(stream.codes, 6).numpy()
    low, high = codes & 15, codes >> 4
    want = np.concatenate([low[:, ::2] | low[:, 1::2] << 4, sum(high[:, i::4] << (2 * i) for i in range(4))], 1)
    assert np.array_equal(planes.codes.numpy(), want) and torch.equal(planes.dequantize(), stream.dequantize())
    every = torch.arange(64, dtype=torch.uint8)[None]
    fmt = formats.get("fp6_42_row")
    assert torch.equal(fmt.unpack(fmt.pack(every)), every) and fmt.pack(every).shape == (1, 48)
    assert mse("fp6_42_row", x) <= 0.2 * mse("int4_row", x) and E3M2.bits == fmt.bits == 6


@pytest.mark.parametrize("name, multiple", [("fp6_42_row", 4), ("planes3_row", 8), ("int3_row", 8), ("int6_row", 4)])
def test_rows_that_fill_no_whole_bytes_are_refused(name, multiple):
    assert formats.padded(30, name) == 32 and formats.get(name).unit == multiple
    with pytest.raises(ValueError, match=f"K divisible by {multiple}, found K=30"):
        formats.get(name).quantize(gaussian(2, 30))


# -- one scale for all ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["int4_tensor", "int8_tensor", "uint4_tensor", "uint8_tensor"])
def test_one_scale_for_the_tensor(name):
    x = gaussian(8, 64) + 2
    q = formats.get(name).quantize(x)
    assert q.scales.shape == (8, 1) and len(q.scales.unique()) == 1
    one = formats.get(name.replace("tensor", "row")).quantize(x.view(1, -1))
    assert torch.equal(q.codes.view(1, -1), one.codes) and torch.equal(q.dequantize().view(1, -1), one.dequantize())
    assert mse(name, x) > mse(name.replace("tensor", "row"), x)


# -- formats that are no table times a step ---------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bitmod4_g128", "power4_row", "lut4_row", "vq2_d4", "planes4_g64", "fp6_42_row"])
def test_irregular_formats_say_so_and_refuse_steps(name):
    """What rounds column by column, or reads codes by itself, must not take them for a table times a step."""
    fmt = formats.get(name)
    q = fmt.quantize(gaussian(4, 256))
    assert not fmt.plain
    with pytest.raises(ValueError, match=f"{name} is no table of values times a step"):
        fmt.step(q.scales, q.global_scale)
