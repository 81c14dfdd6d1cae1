"""Runs the few PTX instructions of the kernels' inline assembly, as the PTX manual defines them, on numpy words.

`lanes` turns a text that works on four bytes at a time into a numpy model for the interpreter: each byte of the input
is put into all four bytes of a word, and the first byte (or half word) of the result is taken. What one byte may do
to its neighbours is tested on random words with `evaluate`. https://docs.nvidia.com/cuda/parallel-thread-execution/
"""

__all__ = ["evaluate", "lanes"]

import re

import numpy as np
import torch

U32 = np.uint32


def evaluate(text, *registers: np.ndarray, outputs: int) -> list[np.ndarray]:
    """Executes `text` on uint32 arrays: operands $outputs, $outputs + 1, … hold `registers`. Returns $0 … $(outputs − 1)."""
    values = {f"${outputs + i}": np.asarray(r, U32) for i, r in enumerate(registers)}
    body = getattr(text, "value", text).strip().removeprefix("{").removesuffix("}")
    for instruction in filter(None, (part.strip() for part in body.split(";"))):
        name, _, rest = " ".join(instruction.split()).partition(" ")
        if name == ".reg":
            continue
        target, *sources = [word.strip() for word in re.split(r",", rest)]
        values[target] = _OPS[name](*[values[s] if s in values else U32(int(s, 0)) for s in sources])
    shape = np.broadcast_shapes(*(np.shape(r) for r in registers))
    return [np.broadcast_to(values[f"${i}"], shape).astype(U32) for i in range(outputs)]


def lanes(text, outputs: int, words: int = 1, dtype=np.int8):
    """A model for `interpreter.register_asm`: bytes (and any int32 vectors after them) to `outputs` tensors of `dtype`.

    words: registers that one output of four elements fills, 1 for bytes, 2 for 16-bit floats.
    """

    def model(b, *others):
        word = b.view(np.uint8).astype(U32) * U32(0x01010101)
        repeated = [o.astype(U32) for other in others for o in [other] * 4]
        out = evaluate(text, word, *repeated, outputs=outputs * words)
        return tuple(
            (out[i * words] & U32((1 << 8 * np.dtype(dtype).itemsize) - 1)).astype(_unsigned(dtype)).view(dtype)
            for i in range(outputs)
        )

    return model


def _unsigned(dtype):
    return np.dtype(f"u{np.dtype(dtype).itemsize}")


def _prmt(a, b, selector):
    """Each nibble of the selector picks one of eight bytes of b:a. The sign replicating mode is not used here."""
    both = a.astype(np.uint64) | (np.asarray(b, np.uint64) << np.uint64(32))
    out = np.zeros(np.shape(both), np.uint64)
    for i in range(4):
        pick = (int(selector) >> (4 * i)) & 15
        assert pick < 8
        out |= ((both >> np.uint64(8 * pick)) & np.uint64(255)) << np.uint64(8 * i)
    return out.astype(U32)


def _halves(dtype, function):
    """Applies a function of float32 tensors to both 16-bit floats of each word, rounding once."""

    def run(*words):
        shape = np.broadcast_shapes(*(np.shape(w) for w in words))
        parts = [
            torch.from_numpy(np.array(np.broadcast_to(w, shape), U32).view(np.int16).copy()).view(dtype).double()
            for w in words
        ]
        out = function(*parts).to(dtype).view(torch.int16).numpy()
        return np.ascontiguousarray(out).view(U32).reshape(shape)

    return run


_OPS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.u32": lambda a, b, c: (
        (a.astype(np.uint64) * np.uint64(b) + c).astype(U32)
        if np.ndim(b) == 0
        else (a.astype(np.uint64) * b.astype(np.uint64) + c).astype(U32)
    ),
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _halves(torch.bfloat16, lambda a, b, c: a * b + c),
    "sub.rn.f16x2": _halves(torch.float16, lambda a, b: a - b),
}
