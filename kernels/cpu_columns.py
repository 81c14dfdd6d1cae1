r"""Rounding column by column with feedback, compiled: what GPTQ does within a block, where torch needs seven calls a column.

Everything is transposed: a column of W (N, K) is a row of memory, rows are taken from the last to the first, and each of the N outputs goes
its own way, so that the result does not depend on the number of threads. Sums are made with fused multiply-adds: the last bit, and now and
then a code at a tie, may differ from the torch path.
"""

__all__ = ["lacking", "round_columns"]

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from qgen.kernels import cpu_compile

_SOURCE = r"""
#include <cmath>
#include <cstdint>

constexpr int64_t WIDE = 64;  // outputs that are handled together: a block of 128 columns then stays in the first cache

static inline float integer(float x, float low, float high) {
  x = std::nearbyint(x);
  return x < low ? low : (x > high ? high : x);
}

static inline float e2m1(float x, float, float) {
  float a = std::fabs(x), scale = a < 2 ? 2.f : (a < 4 ? 1.f : 0.5f);
  a = std::nearbyint(a * scale) / scale;
  return std::copysign(a > 6 ? 6.f : a, x);
}

template <float (*nearest)(float, float, float)>
static void block(float* back, float* lost, float* values, const float* step, const float* feed, int64_t columns, int64_t n,
                  int64_t from, int64_t to, float low, float high) {
  for (int64_t start = from; start < to; start += WIDE) {
    const int64_t width = start + WIDE < to ? WIDE : to - start;
    float local[WIDE];
    for (int64_t i = columns - 1; i >= 0; i--) {
      const int64_t at = i * n + start;
      for (int64_t w = 0; w < width; w++) {
        const float unit = step[at + w], x = unit > 0 ? back[at + w] / unit : 0.f, value = nearest(x, low, high);
        values[at + w] = value;
        local[w] = lost[at + w] = lost[at + w] - value * unit;
      }
      for (int64_t j = 0; j < i; j++) {
        const float factor = feed[i * columns + j];
        float* row = back + j * n + start;
        for (int64_t w = 0; w < width; w++) row[w] += factor * local[w];
      }
    }
  }
}

extern "C" void qgen_round_columns(float* back, float* lost, float* values, const float* step, const float* feed, int64_t columns,
                                   int64_t n, int64_t from, int64_t to, float low, float high, int kind) {
  (kind ? block<e2m1> : block<integer>)(back, lost, values, step, feed, columns, n, from, to, low, high);
}
"""
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w", "-mavx2", "-mfma", "-fno-math-errno", "-fno-trapping-math")
_KINDS = {"integer": 0, "e2m1": 1}


def lacking() -> str:
    """Why `round_columns` cannot be used here, as half a sentence; "" if it can. The first call may compile, for a second or two."""
    if not cpu_compile.capabilities().get("avx2"):
        return "needs a processor with AVX2"
    return cpu_compile.compiled("cpu_columns", _SOURCE, _FLAGS)[1]


def round_columns(
    back: Tensor, lost: Tensor, values: Tensor, step: Tensor, feed: Tensor, kind: str, low: float, high: float
) -> None:
    """Rounds C columns of N outputs, the last one first; all arguments are contiguous float32 on the CPU.

    Arguments:
        back: (C, N) what is to be rounded, feedback from outside the block included; used up.
        lost: (C, N) the same without feedback; becomes what rounding loses of it.
        values: (C, N) receives the rounded values, in units of `step`.
        step: (C, N) where 0, the value is 0.
        feed: (C, C) strictly lower: `back[j] += feed[i, j] · lost[i]` once row i is rounded.
        kind: "integer", clamped to `low` … `high`, or "e2m1".

    Raises RuntimeError with the reason of `lacking` where it cannot run.
    """
    if why := lacking():
        raise RuntimeError(f"rounding by columns {why}")
    tensors = (back, lost, values, step, feed)
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        raise ValueError("rounding by columns takes contiguous float32 tensors on the CPU")
    columns, n = back.shape
    if any(t.shape != back.shape for t in tensors[:4]) or feed.shape != (columns, columns):
        raise ValueError(f"shapes {[tuple(t.shape) for t in tensors]} do not belong together")
    run = cpu_compile.compiled("cpu_columns", _SOURCE, _FLAGS)[0].qgen_round_columns
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def part(start: int, stop: int) -> None:
        sizes = [ctypes.c_int64(size) for size in (columns, n, start, stop)]
        run(*pointers, *sizes, ctypes.c_float(low), ctypes.c_float(high), ctypes.c_int(_KINDS[kind]))

    threads = min(torch.get_num_threads(), n // 256)
    if threads < 2:
        part(0, n)
        return
    cuts = [n * i // threads // 64 * 64 for i in range(threads)] + [n]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, cuts[:-1], cuts[1:]))
