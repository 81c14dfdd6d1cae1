r"""Hadamard matrices of any width that transformers have, and rotations made of them: R = H diag(d) / √n, R Rᵀ = I, d random signs.

n = 2^m · b, H = (Sylvester of 2^m) ⊗ (Paley of b). Paley I, b - 1 a prime that is 3 mod 4: H = I + S with Jacobsthal's matrix of quadratic
residues inside S; Paley II, b / 2 - 1 a prime that is 1 mod 4: H = S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]].
Paley, 1933. Widths: 576 = 16 · 36, 1536 = 128 · 12, 3072 = 256 · 12, 1152 = 32 · 36, 2560 = 128 · 20, …
"""

__all__ = ["hadamard", "rotation"]

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor:
    """(n, n) float64 of ±1 with H Hᵀ = n I. ValueError where n = 2^m · b has no b of Paley's."""
    power, base = n & -n, n // (n & -n)
    made = torch.ones(1, 1, dtype=torch.float64)
    if base > 1:
        while power > 1 and (found := _paley(base)) is None:
            power, base = power // 2, base * 2
        if (found := _paley(base)) is None:
            raise ValueError(f"no Hadamard matrix of order {n} is known here; rotate blocks of {n & -n} instead")
        made = found
    while power > 1:
        made, power = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), made), power // 2
    return made


def rotation(n: int, seed: int = 0) -> Tensor:
    """(n, n) float64, orthogonal: a Hadamard matrix with random signs. A width without one gets blocks along the diagonal."""
    try:
        h = hadamard(n)
    except ValueError:
        block = n & -n
        h = torch.kron(torch.eye(n // block, dtype=torch.float64), hadamard(block))
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return h * signs / h[0].abs().sum().sqrt()


def _paley(b: int) -> Tensor | None:
    """A Hadamard matrix of order b by Paley's constructions over a prime, or None."""
    if b % 4 == 0 and _prime(b - 1) and (b - 1) % 4 == 3:
        s = _bordered(b - 1, -1.0)
        return s + torch.eye(b, dtype=torch.float64)
    if b % 4 == 0 and _prime(b // 2 - 1) and (b // 2 - 1) % 4 == 1:
        s, eye = _bordered(b // 2 - 1, 1.0), torch.eye(b // 2, dtype=torch.float64)
        ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        return torch.kron(s, ones) + torch.kron(eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64))
    return None


def _bordered(q: int, side: float) -> Tensor:
    """[[0, 1ᵀ], [side · 1, J]] with J_ab = 1 where a - b is a square modulo q, -1 where it is none, 0 on the diagonal."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    index = torch.arange(q)
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0] = 1.0, side
    s[1:, 1:] = character[(index[:, None] - index) % q]
    return s


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
