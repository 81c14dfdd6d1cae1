"""The INT4 tensor-core kernel without a GPU: the packing is a bijection, and PTX's fragment tables, written out in
numpy and fed word by word with what the kernel loads, give the exact product.

Gluon does not run in Triton's interpreter, so the kernel's own addresses are checked by executing its compiled PTX, in
test_gluon_ptx.py; here stands the mathematics of its layout.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Gluon, a part of Triton")

from qgen import formats
from qgen.formats import packing
from qgen.kernels import gluon_int4, reference, registry
from qgen.kernels.layouts import codes_to_groups
from qgen.kernels.registry import Ask
from qgen.kernels.slots import Slots


def nibbles(words):
    """Words (…) uint32 to their eight two's complement nibbles (…, 8), lowest first."""
    return (((words[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15).astype(np.int64) ^ 8) - 8


def mma_m16n8k64(a, b, c):
    """D = A · B + C by the fragment tables of the PTX ISA. a (32, 4), b (32, 2) uint32; c (32, 4) integers.

    a_i: row = lane // 4, plus 8 for i in 8..15 and 24..31; column = (lane mod 4) · 8 + i mod 8, plus 32 for i >= 16.
    b_i: row = (lane mod 4) · 8 + i mod 8, plus 32 for i >= 8; column = lane // 4.
    c_i: row = lane // 4, plus 8 for i >= 2; column = (lane mod 4) · 2 + i mod 2.
    """
    left, right = np.zeros((16, 64), np.int64), np.zeros((64, 8), np.int64)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(32):
            row = group + (8 if 8 <= i < 16 or i >= 24 else 0)
            left[row, thread * 8 + i % 8 + (32 if i >= 16 else 0)] = nibbles(a[lane])[i // 8][i % 8]
        for i in range(16):
            right[thread * 8 + i % 8 + (32 if i >= 8 else 0), group] = nibbles(b[lane])[i // 8][i % 8]
    product, out = left @ right, c.copy()
    for lane in range(32):
        for i in range(4):
            out[lane, i] += product[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2]
    return out


def canonical(n, k, rank=0):
    """Slots of a layer; codes of all sixteen values."""
    q = formats.get("int4_g64").quantize(torch.randn(n, k))
    slots = {"codes": torch.randint(0, 256, q.codes.shape, dtype=torch.uint8), "scales": q.scales}
    if rank:
        slots |= {"down": torch.randn(rank, k).bfloat16(), "up": torch.randn(n, rank).bfloat16()}
    return slots


def ask(n, k):
    return Ask("linear", "cuda", "int4_g64", "int4_g64", n=n, k=k, capability=(8, 9))


@pytest.mark.parametrize("rank", [0, 16, 20, 32])
@pytest.mark.parametrize("n", [8, 128, 136, 300])
@pytest.mark.parametrize("k", [64, 192])
def test_packing_there_and_back(k, n, rank):
    slots, kernel = canonical(n, k, rank), registry.find("linear", "gluon_int4")
    packed = kernel.pack(slots, ask(n, k))
    assert packed["codes"].shape == (k // 64, -(-n // 128) * 8, 32, 16) and packed["codes"].dtype == torch.uint8
    back = kernel.unpack(packed, ask(n, k))
    assert back.keys() == slots.keys()
    for name, tensor in slots.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_packed_slots_keep_their_dtypes():
    """`Packed` casts float slots by dtype: words viewed as integers would lose them."""
    slots = canonical(128, 64, 16)
    packed = gluon_int4.pack(slots, ask(128, 64))
    assert all(packed[name].dtype == t.dtype and packed[name].is_contiguous() for name, t in slots.items())


def test_fragments_by_their_formula():
    words = torch.arange(2 * 32 * 8, dtype=torch.int32).view(2, 32, 8)
    fragments = gluon_int4.to_fragments(words)
    for g, r, w in [(0, 0, 0), (0, 9, 3), (1, 31, 7), (1, 16, 4), (0, 5, 6)]:
        lane, register = 4 * (r % 8) + w % 4, 2 * (r // 8 % 2) + w // 4
        assert fragments[g, r // 16, lane, register] == words[g, r, w]
    assert torch.equal(gluon_int4.from_fragments(fragments), words)


def test_fragment_model_gives_the_exact_product():
    """Operand A word by word as the kernel addresses it, operand B as packed, results where the kernel writes them."""
    m, n, k = 32, 128, 128
    x = torch.randint(0, 256, (m, k // 2), dtype=torch.uint8)
    slots = canonical(n, k)
    a = codes_to_groups(x, 4).view(torch.int32).numpy().view(np.uint32)  # (K / 64, M, 8) words
    b = gluon_int4.pack(slots, ask(n, k))["codes"].view(torch.int32).numpy().view(np.uint32).reshape(k // 64, -1, 32, 4)
    lane = np.arange(32)
    y = np.zeros((m, n), np.int64)
    for mt in range(m // 16):
        for nt in range(n // 16):
            c = [np.zeros((32, 4), np.int64) for _ in range(2)]
            for g in range(k // 64):
                registers = [a[g, mt * 16 + lane // 4 + 8 * j, lane % 4 + 4 * i] for i in range(2) for j in range(2)]
                left = np.stack(registers, 1)
                c = [mma_m16n8k64(left, b[g, nt][:, 2 * half : 2 * half + 2], c[half]) for half in range(2)]
            for half in range(2):
                for r in range(4):
                    y[mt * 16 + lane // 4 + 8 * (r // 2), nt * 16 + 8 * half + lane % 4 * 2 + r % 2] = c[half][:, r]
    values = [(packing.unpack(t, 4).long() ^ 8) - 8 for t in (x, slots["codes"])]
    assert np.array_equal(y, (values[0] @ values[1].T).numpy())


def test_magic_start_is_exact():
    """0x4B400000 + n, read as a float, is 12582912 + n for every sum that 64 products of nibbles can give."""
    n = np.arange(-64 * 8 * 15, 64 * 8 * 15 + 1, dtype=np.int32)
    assert np.array_equal((n + np.int32(0x4B400000)).view(np.float32) - np.float32(12582912.0), n.astype(np.float32))


def test_too_few_rows_are_refused():
    from qgen.kernels.triton_act import Activations

    packed = gluon_int4.pack(canonical(128, 64), ask(128, 64))
    act = Activations(torch.zeros(1, 16, 32, dtype=torch.uint8), torch.zeros(1, 16), None, None, 16)
    with pytest.raises(ValueError, match="needs at least 128 rows"):
        gluon_int4.int4_gemm(act, "int4_g64", packed["codes"], packed["scales"], None, None, 128)


def test_gradient_reads_packed_slots():
    """`linear_grad` unpacks; the weight it sees is the one that was packed."""
    slots = canonical(136, 64, 16)
    packed = gluon_int4.pack(slots, ask(136, 64))
    dy = torch.randn(3, 136)
    grad = reference.linear_grad(dy, Slots.of(packed, "int4_g64", "int4_g64", 136), 64, "gluon_int4")
    want = reference.linear_grad(dy, Slots.of(slots, "int4_g64", "int4_g64", 136), 64, "reference")
    assert torch.equal(grad, want)
