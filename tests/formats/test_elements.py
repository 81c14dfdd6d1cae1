"""Every code of every element against tables written by hand, ml_dtypes and torch's own 8-bit floats."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from qgen.formats import integer
from qgen.formats.fp4 import E2M1
from qgen.formats.fp8 import E4M3, E5M2
from qgen.formats.integer import INT4, INT8, UINT4, UINT8
from qgen.formats.minifloat import E1M2, E2M3, E3M0, E3M2
from qgen.formats.mx import MXINT8

NAN = float("nan")
TABLES = {
    "int4": (INT4, [0, 1, 2, 3, 4, 5, 6, 7, NAN, -7, -6, -5, -4, -3, -2, -1]),  # -8 is never emitted
    "uint4": (UINT4, list(range(16))),
    "e2m1": (E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
    "e1m2": (E1M2, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, -0.0, -0.25, -0.5, -0.75, -1, -1.25, -1.5, -1.75]),
    "e3m0": (E3M0, [0, 0.25, 0.5, 1, 2, 4, 8, 16, -0.0, -0.25, -0.5, -1, -2, -4, -8, -16]),
}
# value → value it must round to: every midpoint of neighbours, ties to the even mantissa (integers: to the even integer)
TIES = {
    "int4": {
        0.5: 0,
        1.5: 2,
        2.5: 2,
        3.5: 4,
        4.5: 4,
        5.5: 6,
        6.5: 6,
        -0.5: 0,
        -1.5: -2,
        -2.5: -2,
        -3.5: -4,
        -4.5: -4,
        -5.5: -6,
        -6.5: -6,
    },
    "uint4": {0.5: 0, 1.5: 2, 2.5: 2, 3.5: 4, 7.5: 8, 8.5: 8, 13.5: 14, 14.5: 14},
    "e2m1": {
        0.25: 0,
        0.75: 1,
        1.25: 1,
        1.75: 2,
        2.5: 2,
        3.5: 4,
        5.0: 4,
        -0.25: 0,
        -0.75: -1,
        -1.25: -1,
        -1.75: -2,
        -2.5: -2,
        -3.5: -4,
        -5.0: -4,
    },
    "e1m2": {0.125: 0, 0.375: 0.5, 0.625: 0.5, 0.875: 1, 1.125: 1, 1.375: 1.5, 1.625: 1.5, -0.375: -0.5, -1.625: -1.5},
    "e3m0": {0.125: 0, 0.375: 0.5, 0.75: 0.5, 1.5: 2, 3.0: 2, 6.0: 8, 12.0: 8, -0.375: -0.5, -12.0: -8},  # even code
}
BEYOND = {"int4": (7, -7), "uint4": (15, 0), "e2m1": (6, -6), "e1m2": (1.75, -1.75), "e3m0": (16, -16)}


def there_and_back(element, values):
    return element.decode(element.encode(torch.tensor(values)))


@pytest.mark.parametrize("name", TABLES)
def test_all_sixteen_codes(name):
    element, table = TABLES[name]
    decoded = element.decode(torch.arange(16, dtype=torch.uint8))
    for code, value in enumerate(table):
        if value == value:
            assert decoded[code] == value
            if code != 8 or name == "uint4":
                assert element.encode(torch.tensor([float(value)])) == code
    assert element.bits == 4 and element.max == max(v for v in table if v == v)


@pytest.mark.parametrize("name", TABLES)
def test_ties_go_to_even(name):
    element = TABLES[name][0]
    assert there_and_back(element, list(TIES[name])).tolist() == [float(v) for v in TIES[name].values()]


@pytest.mark.parametrize("name", TABLES)
def test_just_beside_a_tie_goes_to_the_nearer(name):
    element, table = TABLES[name]
    grid = sorted({v + 0.0 for v in table if v == v})
    for low, high in pairwise(grid):
        middle = torch.tensor((low + high) / 2)
        below, above = torch.nextafter(middle, torch.tensor(low)), torch.nextafter(middle, torch.tensor(high))
        assert there_and_back(element, [float(below), float(above)]).tolist() == [low, high]


@pytest.mark.parametrize("name", TABLES)
def test_largest_smallest_and_beyond(name):
    element = TABLES[name][0]
    top, bottom = BEYOND[name]
    values = [element.max, element.min, top * 1.0001 + 1, bottom - 1.0, 1e30, -1e30, float("inf"), float("-inf")]
    assert there_and_back(element, values).tolist() == [top, bottom] * 4


@pytest.mark.parametrize("name", TABLES)
def test_zero_is_zero(name):
    element = TABLES[name][0]
    assert element.encode(torch.tensor([0.0])) == 0
    assert there_and_back(element, [0.0, -0.0]).abs().tolist() == [0, 0]


def test_e2m1_keeps_the_sign_of_zero_as_hardware_does():
    assert E2M1.encode(torch.tensor([-0.0, -0.1, 0.1])).tolist() == [8, 8, 0]


@pytest.mark.parametrize("element", [INT4, UINT4, INT8, UINT8, E2M1], ids=lambda e: e.name)
def test_nan_gives_the_largest_finite_code(element):
    assert element.decode(element.encode(torch.tensor([NAN]))) == element.max


def test_int4_never_emits_minus_eight():
    codes = INT4.encode(torch.linspace(-20, 20, 4001))
    assert 8 not in codes.tolist() and set(codes.tolist()) == set(range(16)) - {8}


def many(top=448.0):
    """A million values over the whole range, every tie of a small float, and the specials."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(1_000_000, generator=generator) * torch.exp2(
        torch.rand(1_000_000, generator=generator) * 40 - 24
    )
    special = [
        0.0,
        -0.0,
        1e-40,
        -1e-40,
        1e-45,
        2.0**-126,
        448,
        -448,
        464,
        57344,
        -57344,
        61440,
        6,
        -6,
        2.0**-10,
        2.0**-9,
        top,
        -top,
    ]
    return torch.cat([wide, torch.arange(-4096, 4097) / 128, torch.arange(-512, 513) / 8192, torch.tensor(special)])


@pytest.mark.parametrize(
    "element, kind",
    [(E2M1, ml_dtypes.float4_e2m1fn), (E2M3, ml_dtypes.float6_e2m3fn), (E3M2, ml_dtypes.float6_e3m2fn)],
    ids=["e2m1", "e2m3", "e3m2"],
)
def test_small_floats_equal_ml_dtypes(element, kind):
    """A million and the specials, infinity too; NaN there becomes -0 and here the largest value."""
    x = torch.cat([many(element.max), torch.tensor([torch.inf, -torch.inf])])
    theirs = x.numpy().astype(kind)  # saturates, ties to even, keeps the sign of zero
    assert np.array_equal(element.encode(x).numpy(), theirs.view(np.uint8))
    every = torch.arange(1 << element.bits, dtype=torch.uint8)
    assert np.array_equal(element.decode(every).numpy(), every.numpy().view(kind).astype(np.float32))
    assert np.array_equal(np.signbit(element.decode(every).numpy()), every.numpy() >= 1 << (element.bits - 1))
    assert element.decode(element.encode(torch.tensor([NAN]))) == element.max


@pytest.mark.parametrize(
    "element, kind", [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_equals_ml_dtypes_and_saturates(element, kind):
    """ml_dtypes, like a plain cast in torch, turns what rounds beyond the largest value into NaN or infinity; here it saturates."""
    x = many()
    inside = x[x.abs() <= element.max]
    assert len(inside) > 800_000
    assert np.array_equal(element.encode(inside).numpy(), inside.numpy().astype(kind).view(np.uint8))
    beyond = [1e9, -1e9, element.max, element.min, element.max * 1.04, element.min * 1.04, float("inf"), float("-inf")]
    assert there_and_back(element, beyond).tolist() == [element.max, element.min] * 4
    finite = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    decoded = element.decode(torch.arange(256, dtype=torch.uint8)).numpy()
    assert np.array_equal(decoded, finite, equal_nan=True)


@pytest.mark.parametrize(
    "element, bits, top, smallest",
    [
        (E4M3, 8, 448.0, 2.0**-9),
        (E5M2, 8, 57344.0, 2.0**-16),
        (E2M3, 6, 7.5, 0.125),
        (E3M2, 6, 28.0, 0.0625),
        (E1M2, 4, 1.75, 0.25),
        (E3M0, 4, 16.0, 0.25),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_constants_of_floats(element, bits, top, smallest):
    assert (element.bits, element.max, element.min) == (bits, top, -top)
    assert min(v for v in element.values if v > 0) == smallest


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False], ids=["int", "uint"])
def test_integers_equal_a_numpy_line(signed, bits):
    element = getattr(integer, f"{'INT' if signed else 'UINT'}{bits}")
    top = 2 ** (bits - signed) - 1
    low = -top if signed else 0
    x = torch.cat([torch.randn(1_000_000) * top / 2, torch.arange(-300, 301) / 2, torch.tensor([1e-40, 1e30, -1e30])])
    want = np.clip(np.rint(x.numpy()), low, top).astype(np.int64)
    codes = element.encode(x)
    assert np.array_equal(codes.numpy(), want & (2**bits - 1))
    assert np.array_equal(element.decode(codes).numpy(), want) and torch.equal(element.round(x), element.decode(codes))
    assert (element.bits, element.max, element.min) == (bits, top, low)


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_of_integers_are_those_of_ml_dtypes(bits):
    for signed in (True, False):
        element = getattr(integer, f"{'INT' if signed else 'UINT'}{bits}")
        kind = getattr(ml_dtypes, f"{'' if signed else 'u'}int{bits}")
        theirs = np.arange(element.min, element.max + 1).astype(kind)
        mine = element.encode(torch.arange(element.min, element.max + 1))
        assert np.array_equal(mine.numpy(), theirs.view(np.uint8) & (2**bits - 1))


def test_mxint8_has_six_bits_after_the_point():
    x = torch.cat([torch.randn(100_000), torch.arange(-300, 301) / 128, torch.tensor([torch.inf, -torch.inf])])
    want = np.clip(np.rint(x.numpy() * 64), -127, 127)
    codes = MXINT8.encode(x)
    assert np.array_equal(codes.view(torch.int8).numpy(), want) and MXINT8.max == 127 / 64
    assert np.array_equal(MXINT8.decode(codes).numpy(), want / 64) and torch.equal(
        MXINT8.round(x), MXINT8.decode(codes)
    )
