"""Every code of every element against tables written by hand, ml_dtypes and torch's own 8-bit floats."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from qgen.formats.fp4 import E2M1
from qgen.formats.fp8 import E4M3, E5M2
from qgen.formats.integer import INT4, INT8, UINT4, UINT8

NAN = float("nan")
TABLES = {
    "int4": (INT4, [0, 1, 2, 3, 4, 5, 6, 7, NAN, -7, -6, -5, -4, -3, -2, -1]),  # -8 is never emitted
    "uint4": (UINT4, list(range(16))),
    "e2m1": (E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
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
}
BEYOND = {"int4": (7, -7), "uint4": (15, 0), "e2m1": (6, -6)}


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


def many():
    """A hundred thousand values over the whole range, their midpoints' neighbourhood, and the specials."""
    generator = torch.Generator().manual_seed(7)
    wide = torch.randn(100_000, generator=generator) * torch.exp2(torch.rand(100_000, generator=generator) * 40 - 24)
    return torch.cat(
        [wide, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 448, -448, 57344, -57344, 6, -6, 464, 2.0**-10, 2.0**-9])]
    )


def test_e2m1_equals_ml_dtypes():
    x = torch.cat([many(), torch.linspace(-7, 7, 20_001)])
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn)  # saturates, ties to even, keeps the sign of zero
    assert np.array_equal(E2M1.encode(x).numpy(), theirs.view(np.uint8) & 15)


@pytest.mark.parametrize(
    "element, kind", [(E4M3, ml_dtypes.float8_e4m3fn), (E5M2, ml_dtypes.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_fp8_equals_ml_dtypes_and_saturates(element, kind):
    x = many()
    inside = x[x.abs() <= element.max]
    assert len(inside) > 80_000
    assert np.array_equal(element.encode(inside).numpy(), inside.numpy().astype(kind).view(np.uint8))
    assert there_and_back(element, [1e9, -1e9, element.max, element.min]).tolist() == [element.max, element.min] * 2
    finite = np.arange(256, dtype=np.uint8).view(kind).astype(np.float32)
    decoded = element.decode(torch.arange(256, dtype=torch.uint8)).numpy()
    assert np.array_equal(decoded, finite, equal_nan=True)


@pytest.mark.parametrize(
    "element, top, smallest", [(E4M3, 448.0, 2.0**-9), (E5M2, 57344.0, 2.0**-16)], ids=["e4m3", "e5m2"]
)
def test_fp8_constants(element, top, smallest):
    assert (element.max, element.min) == (top, -top)
    assert min(v for v in element.values if v > 0) == smallest


@pytest.mark.parametrize(
    "element, bits, low",
    [(INT8, 8, -127), (UINT8, 8, 0), (INT4, 4, -7), (UINT4, 4, 0)],
    ids=["int8", "uint8", "int4", "uint4"],
)
def test_integers_equal_a_numpy_line(element, bits, low):
    x = torch.cat([torch.randn(100_000) * 60, torch.arange(-300, 301) / 2])
    want = np.clip(np.rint(x.numpy()), low, 2 ** (bits - (low < 0)) - 1).astype(np.int64) & (2**bits - 1)
    assert np.array_equal(element.encode(x).numpy(), want)
