"""The block Hadamard transform: its matrices are orthogonal signs, the kernel multiplies by them."""

import interpreter
import pytest
import torch

interpreter.needed()

from qgen.kernels import reference
from qgen.kernels.triton_hadamard import hadamard, matrix, sizes


@pytest.mark.parametrize("size", sizes())
def test_matrix_is_orthonormal_and_flat(size):
    h = matrix(size)
    assert torch.allclose(h @ h.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5))


@pytest.mark.parametrize("size", [2, 16, 64, 256])
def test_powers_of_two_are_the_reference(size):
    x = torch.randn(3, size, dtype=torch.float64)
    assert torch.allclose(x @ matrix(size), reference.hadamard_blocks(x, size))


def test_sizes_hold_multiples_of_paleys_orders():
    assert {2, 4, 12, 16, 20, 24, 28, 36, 40, 44, 48, 56, 60, 72, 80, 96, 112, 128, 144, 224, 256, 288, 512} <= set(
        sizes()
    )


@pytest.mark.parametrize("size", [2, 12, 16, 20, 28, 48, 64, 72, 96, 128, 240, 256])
def test_kernel_multiplies(size):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 3e-4)):
        x = torch.randn(2, 17, 3 * size).to(dtype)
        before = x.clone()
        y = hadamard(x, size)
        want = (x.double().unflatten(-1, (3, size)) @ matrix(size)).flatten(-2)
        assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, before)
        assert (y - want).norm() <= tolerance * want.norm()


def test_transposing_undoes():
    x = torch.randn(5, 96)
    y = hadamard(x, 48)
    assert torch.allclose((y.double().unflatten(-1, (2, 48)) @ matrix(48).T).flatten(-2).float(), x, atol=1e-5)


def test_rows_may_lie_apart():
    x = torch.randn(9, 128)
    assert torch.equal(hadamard(x[:, :64], 64), hadamard(x[:, :64].contiguous(), 64))


@pytest.mark.parametrize("size", [3, 36, 64])
def test_refusals(size):
    with pytest.raises(ValueError, match=f"found {size} for K=96"):
        hadamard(torch.zeros(2, 96), size)
