r"""C++ source of the kernel `cpu_native`: int8 products of 4-bit weights on AVX-512 VNNI, as one string, compiled where a compiler is.

A call is one parallel region of two phases.
  1. `quantize_rows`: rows of x (M, K) become codes u = q + 128 (M, Kp) uint8 with one float32 step per row; h = x · downᵀ (M, R) is
     rounded to bfloat16.
  2. `multiply_panel`: a task is a panel of 64 outputs times a range of rows. The panel's weights are unpacked once to int8 (64 · Kp bytes
     in L2), then tiles of 6 rows x 64 outputs accumulate `vpdpbusd` over all of K in registers, starting from -128 · Σ_k w[n, k], and
     are finished there: y = acc · step_x[m] · step_w[n] + h · upᵀ + bias.
Sums over K are integers and every output belongs to one task: the result does not depend on the number of threads.
A second entry multiplies bfloat16 rows with 4-bit weights of any element: the panel is unpacked to bfloat16 by a table of 16 values.

Layouts (written by `cpu_native.py`), P = N / 64 panels, n = 16 j + i within a panel:
  int8:  (P, Kp/4, 4 j, 16 i, 4 k) int8, the order in which the products read it.
  int4:  (P, Kp/8, 4 j, 16 i, 2 pairs) uint16; its nibbles, lowest first, are k = 2 pair, 2 pair + 1, 4 + 2 pair, 5 + 2 pair.
  any:   (P, Kp/8, 4 j, 16 i) uint32 of 8 codes, the first lowest; steps and zeros (P, G, 64) float32.
  subscales (P, G, 64) uint8; step_w (64 P) float32; down (K/2, R, 2) bfloat16; up (P, R/2, 64, 2) bfloat16.
No OpenMP at build time: the caller hands over `GOMP_parallel` of the runtime that torch has loaded, so that both share one pool.
"""

__all__ = ["SOURCE"]

SOURCE = r"""
#include <immintrin.h>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sched.h>

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static Parallel parallel_region = nullptr;

template <class F> static void body(void* p) { (*static_cast<F*>(p))(); }

// Runs first(task) for all its tasks, then second(task) for all its own, in one parallel region. Threads take the next free task, and wait
// between the two only for tasks that others have begun: a thread that the system has paused, or not yet started, holds nobody up there.
template <class F, class S> static void parallel(int threads, int64_t firsts, F first, int64_t seconds, S second) {
  std::atomic<int64_t> next_first{0}, done{0}, next_second{0};
  auto loop = [&] {
    for (int64_t t; (t = next_first.fetch_add(1, std::memory_order_relaxed)) < firsts;) {
      first(t);
      done.fetch_add(1, std::memory_order_release);
    }
    for (int spin = 1; done.load(std::memory_order_acquire) < firsts; spin++) { if (spin % 64) _mm_pause(); else sched_yield(); }
    for (int64_t t; (t = next_second.fetch_add(1, std::memory_order_relaxed)) < seconds;) second(t);
  };
  if (threads > seconds && threads > firsts) threads = int(seconds > firsts ? seconds : firsts);
  if (threads > 1 && parallel_region) parallel_region(body<decltype(loop)>, &loop, unsigned(threads), 0); else loop();
}

// A buffer that each thread keeps for the next call.
template <int id> static uint8_t* scratch(int64_t bytes) {
  struct Buffer { uint8_t* p = nullptr; int64_t size = 0; ~Buffer() { std::free(p); } };
  static thread_local Buffer b;
  if (b.size < bytes) {
    std::free(b.p);
    b.size = (bytes + 4095) / 4096 * 4096;
    b.p = static_cast<uint8_t*>(std::aligned_alloc(4096, size_t(b.size)));
  }
  return b.p;
}

static inline __mmask16 tail(int64_t left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1); }

struct BF16 {
  typedef uint16_t type;
  static inline __m512 load(const type* p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  static inline void store(type* p, __mmask16 m, __m512 v) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v)); }
};
struct FP32 {
  typedef float type;
  static inline __m512 load(const type* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
  static inline void store(type* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
};

struct Args {
  const void *x, *weight, *sub, *down, *up, *bias, *smooth, *shift;
  const float *step_w, *act_step;
  uint8_t* codes;       // (M, Kp)
  float* step_x;        // (M)
  uint16_t* hidden;     // (M, R) bfloat16
  void* y;              // (M, N)
  int64_t m, k, kp, n, r, block, shift_n;
  int threads;
};

// By hand: with the intrinsics, GCC 12 copies the accumulator before and after each product.
static inline void dot_int8(__m512i& sum, __m512i u, __m512i s) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s)); }
static inline void dot_bf16(__m512& sum, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// ---- phase 1 ------------------------------------------------------------------------------------------------------------
template <class T> static void quantize_row(const Args& a, int64_t row, float* values, const float* inverse) {
  typedef typename T::type t;
  const t* x = static_cast<const t*>(a.x) + row * a.k;
  const t* shift = static_cast<const t*>(a.shift);
  uint8_t* codes = a.codes + row * a.kp;
  const __m512 sign = _mm512_set1_ps(-0.0f);
  __m512 top = _mm512_setzero_ps(), fixed = _mm512_setzero_ps();
  __mmask16 nan = 0;
  if (shift && a.shift_n == 1) { __mmask16 one = 1; fixed = _mm512_broadcastss_ps(_mm512_castps512_ps128(T::load(shift, one))); }
  for (int64_t k = 0; k < a.k; k += 16) {
    const __mmask16 m = tail(a.k - k);
    __m512 v = T::load(x + k, m);
    if (shift) v = _mm512_maskz_add_ps(m, v, a.shift_n == 1 ? fixed : T::load(shift + k, m));
    if (inverse) v = _mm512_maskz_mul_ps(m, v, _mm512_maskz_loadu_ps(m, inverse + k));
    _mm512_storeu_ps(values + k, v);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    top = _mm512_max_ps(top, _mm512_andnot_ps(sign, v));
  }
  float step;
  if (a.act_step) step = *a.act_step;
  else {
    step = _mm512_reduce_max_ps(top) / 127.0f;
    if (nan || !(step > 0)) step = 0; // as the reference: a row with a NaN has no scale
    else if (!(step > 1e-38f)) step = 1e-38f;
    else if (step > 3.40282347e38f) step = 3.40282347e38f;
  }
  a.step_x[row] = step;
  const __m512 scale = _mm512_set1_ps(step > 0 ? 1.0f / step : 0.0f);
  const __m512 high = _mm512_set1_ps(127.0f), low = _mm512_set1_ps(-127.0f);
  const __m128i flip = _mm_set1_epi8(char(0x80));
  for (int64_t k = 0; k < a.k; k += 16) {
    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(values + k), scale);
    v = _mm512_max_ps(_mm512_min_ps(v, high), low); // min returns its second operand for NaN: 127, as the reference
    const __m128i q = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)), flip);
    _mm_mask_storeu_epi8(codes + k, tail(a.k - k), q);
  }
  if (a.kp > a.k) std::memset(codes + a.k, 128, size_t(a.kp - a.k));
}

template <int V, int MR> static void project(const Args& a, int64_t row, int64_t r) {
  const uint16_t* x = static_cast<const uint16_t*>(a.x) + row * a.k;
  const uint16_t* d = static_cast<const uint16_t*>(a.down) + 2 * r;
  __m512 acc[MR][V];
  for (int i = 0; i < MR; i++) for (int j = 0; j < V; j++) acc[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < a.k; k += 2, d += 2 * a.r) {
    __m512i b[V];
    for (int j = 0; j < V; j++) b[j] = _mm512_loadu_si512(d + 32 * j);
    for (int i = 0; i < MR; i++) {
      int32_t pair; std::memcpy(&pair, x + i * a.k + k, 4);
      const __m512i v = _mm512_set1_epi32(pair);
      for (int j = 0; j < V; j++) dot_bf16(acc[i][j], v, b[j]);
    }
  }
  for (int i = 0; i < MR; i++) for (int j = 0; j < V; j++)
    BF16::store(a.hidden + (row + i) * a.r + r + 16 * j, 0xffff, acc[i][j]);
}

template <int MR> static void project_rows(const Args& a, int64_t row) {
  int64_t r = 0;
  for (; r + 32 <= a.r; r += 32) project<2, MR>(a, row, r);
  if (r < a.r) project<1, MR>(a, row, r);
}

// 1 / smooth, (K) float32, or null
template <class T> static float* inverse_smooth(const Args& a) {
  const typename T::type* smooth = static_cast<const typename T::type*>(a.smooth);
  if (!smooth) return nullptr;
  float* inverse = reinterpret_cast<float*>(scratch<0>((a.k + 16) * 4));
  for (int64_t k = 0; k < a.k; k += 16) {
    const __mmask16 m = tail(a.k - k);
    _mm512_mask_storeu_ps(inverse + k, m, _mm512_div_ps(_mm512_set1_ps(1.0f), T::load(smooth + k, m)));
  }
  return inverse;
}

static const int64_t ROWS = 8; // of a task of phase 1

template <class T> static void quantize_rows(const Args& a, int64_t task, const float* inverse) {
  float* values = reinterpret_cast<float*>(scratch<1>((a.k + 16) * 4));
  int64_t row = task * ROWS, end = row + ROWS < a.m ? row + ROWS : a.m;
  for (int64_t i = row; i < end; i++) quantize_row<T>(a, i, values, inverse);
  if (!a.down) return;
  for (; row + ROWS <= end; row += ROWS) project_rows<ROWS>(a, row);
  for (; row < end; row++) project_rows<1>(a, row);
}

// ---- phase 2 ------------------------------------------------------------------------------------------------------------
// 64 outputs x Kp of 4-bit codes to int8 code * subscale in the order of the products; adds Σ_k w to sums.
static void unpack_int4(const Args& a, int64_t panel, int8_t* out, __m512i sums[4]) {
  const int64_t steps = a.kp / 8, per = a.block / 8, groups = a.kp / a.block;
  const uint8_t* p = static_cast<const uint8_t*>(a.weight) + panel * steps * 256;
  const uint8_t* s = static_cast<const uint8_t*>(a.sub) + panel * groups * 64;
  const __m512i low = _mm512_set1_epi16(0x00ff), ones = _mm512_set1_epi8(1);
  for (int64_t g = 0; g < groups; g++) {
    __m512i s4[4], s8[4];
    for (int j = 0; j < 4; j++) {
      const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + g * 64 + 16 * j)));
      const __m512i both = _mm512_or_si512(v, _mm512_slli_epi32(v, 16));
      s4[j] = _mm512_slli_epi16(both, 4);
      s8[j] = _mm512_slli_epi16(both, 8);
    }
    for (int64_t i = 0; i < per; i++, p += 256, out += 512) {
      for (int j = 0; j < 4; j++) {
        const __m512i v = _mm512_loadu_si512(p + 64 * j);
        const __m512i high = _mm512_set1_epi16(short(0xf000));
        // (code << 12) * (sub << 4) >> 16 = code * sub; (code) * (sub << 8) = code * sub in the upper byte
        const __m512i k0 = _mm512_mulhi_epi16(_mm512_slli_epi16(v, 12), s4[j]);
        const __m512i k1 = _mm512_mullo_epi16(_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 12), s8[j]);
        const __m512i k2 = _mm512_mulhi_epi16(_mm512_and_si512(_mm512_slli_epi16(v, 4), high), s4[j]);
        const __m512i k3 = _mm512_mullo_epi16(_mm512_srai_epi16(v, 12), s8[j]);
        const __m512i first = _mm512_ternarylogic_epi32(k0, low, k1, 0xea);   // (k0 & low) | k1
        const __m512i second = _mm512_ternarylogic_epi32(k2, low, k3, 0xea);
        _mm512_store_si512(out + 64 * j, first);
        _mm512_store_si512(out + 256 + 64 * j, second);
        dot_int8(sums[j], ones, first);
        dot_int8(sums[j], ones, second);
      }
    }
  }
}

static void sum_int8(const Args& a, const int8_t* w, __m512i sums[4]) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < a.kp / 4; i++) for (int j = 0; j < 4; j++)
    dot_int8(sums[j], ones, _mm512_loadu_si512(w + 256 * i + 64 * j));
}

template <class T, int MR> static void tile(const Args& a, int64_t row, int64_t panel, const int8_t* w, const __m512i start[4]) {
  __m512i acc[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[i][j] = start[j];
  const uint8_t* x = a.codes + row * a.kp;
  const int64_t kp = a.kp;
  for (int64_t k = 0; k < kp; k += 4, w += 256) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      int32_t four; std::memcpy(&four, x + i * kp + k, 4);
      const __m512i v = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) dot_int8(acc[i][j], v, b[j]);
    }
  }
  __m512 y[MR][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int64_t n = panel * 64 + 16 * j;
    const __m512 step = _mm512_loadu_ps(a.step_w + n);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      y[i][j] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][j]), step), _mm512_set1_ps(a.step_x[row + i]));
  }
  if (a.up) {
    const uint16_t* u = static_cast<const uint16_t*>(a.up) + panel * 64 * a.r;
    const uint16_t* h = a.hidden + row * a.r;
    for (int64_t r = 0; r < a.r; r += 2, u += 128) {
      __m512i b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(u + 32 * j);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        int32_t pair; std::memcpy(&pair, h + i * a.r + r, 4);
        const __m512i v = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dot_bf16(y[i][j], v, b[j]);
      }
    }
  }
  typedef typename T::type t;
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int64_t n = panel * 64 + 16 * j;
    if (n >= a.n) break;
    const __mmask16 m = tail(a.n - n);
    const __m512 bias = a.bias ? T::load(static_cast<const t*>(a.bias) + n, m) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) T::store(static_cast<t*>(a.y) + (row + i) * a.n + n, m, _mm512_add_ps(y[i][j], bias));
  }
}

struct Plan {
  int64_t tasks, chunks, rows; // a task is panel task / chunks, rows [task % chunks] * rows ...

  explicit Plan(const Args& a) {
    const int64_t panels = (a.n + 63) / 64;
    chunks = 1; // rows are split where panels alone would not keep the threads busy
    while (panels * chunks < 4 * a.threads && a.m / (chunks + 1) >= 48) chunks++;
    rows = ((a.m + chunks - 1) / chunks + 5) / 6 * 6;
    chunks = (a.m + rows - 1) / rows;
    tasks = panels * chunks;
  }
};

template <class T> static void multiply_panel(const Args& a, const Plan& plan, int64_t task, bool int4) {
  const int64_t panel = task / plan.chunks, from = task % plan.chunks * plan.rows, to = from + plan.rows < a.m ? from + plan.rows : a.m;
  __m512i sums[4];
  for (int j = 0; j < 4; j++) sums[j] = _mm512_setzero_si512();
  const int8_t* w = static_cast<const int8_t*>(a.weight) + panel * 64 * a.kp;
  if (int4) {
    int8_t* out = reinterpret_cast<int8_t*>(scratch<2>(64 * a.kp));
    unpack_int4(a, panel, out, sums);
    w = out;
  } else sum_int8(a, w, sums);
  for (int j = 0; j < 4; j++) sums[j] = _mm512_mullo_epi32(sums[j], _mm512_set1_epi32(-128));
  int64_t row = from;
  for (; row + 6 <= to; row += 6) tile<T, 6>(a, row, panel, w, sums);
  switch (to - row) {
    case 5: tile<T, 5>(a, row, panel, w, sums); break;
    case 4: tile<T, 4>(a, row, panel, w, sums); break;
    case 3: tile<T, 3>(a, row, panel, w, sums); break;
    case 2: tile<T, 2>(a, row, panel, w, sums); break;
    case 1: tile<T, 1>(a, row, panel, w, sums); break;
  }
}

template <class T> static void linear(const Args& a, bool int4, bool only_codes) {
  if (a.m == 0) return;
  const float* inverse = inverse_smooth<T>(a);
  const Plan plan(a);
  parallel(
      a.threads, a.x ? (a.m + ROWS - 1) / ROWS : 0, [&](int64_t task) { quantize_rows<T>(a, task, inverse); },
      only_codes ? 0 : plan.tasks, [&](int64_t task) { multiply_panel<T>(a, plan, task, int4); });
}

// ---- 4-bit weights of any element times bfloat16 ------------------------------------------------------------------------
// 64 outputs x Kp to bfloat16(table[code] * step + zero), in pairs along k: (Kp/2, 64, 2).
static void unpack_table(const Args& a, int64_t panel, const float* table, const float* step, const float* zero, uint16_t* out) {
  const int64_t steps = a.kp / 8, groups = a.kp / a.block;
  const uint8_t* p = static_cast<const uint8_t*>(a.weight) + panel * steps * 256;
  const __m512 values = _mm512_loadu_ps(table);
  for (int64_t i = 0; i < steps; i++, p += 256, out += 512) {
    const int64_t g = (panel * groups + i * 8 / a.block) * 64;
    for (int j = 0; j < 4; j++) {
      __m512i v = _mm512_loadu_si512(p + 64 * j); // 8 codes of each of 16 outputs
      const __m512 s = _mm512_loadu_ps(step + g + 16 * j), z = zero ? _mm512_loadu_ps(zero + g + 16 * j) : _mm512_setzero_ps();
      for (int t = 0; t < 4; t++, v = _mm512_srli_epi32(v, 8)) {
        const __m512 even = _mm512_permutexvar_ps(v, values), odd = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), values);
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_mul_ps(even, s), z)));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_mul_ps(odd, s), z)));
        _mm512_storeu_si512(out + 128 * t + 32 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
}

template <int MR> static void tile_bf16(const Args& a, int64_t row, int64_t panel, const uint16_t* w) {
  __m512 acc[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) acc[i][j] = _mm512_setzero_ps();
  const uint16_t* factors[2] = {w, static_cast<const uint16_t*>(a.up) + (a.up ? panel * 64 * a.r : 0)};
  const uint16_t* inputs[2] = {static_cast<const uint16_t*>(a.x) + row * a.kp, a.hidden + (a.up ? row * a.r : 0)};
  const int64_t lengths[2] = {a.kp, a.up ? a.r : 0};
  for (int part = 0; part < 2; part++) { // the weight, then the low-rank pair
    const uint16_t *b_at = factors[part], *x = inputs[part];
    const int64_t length = lengths[part];
    for (int64_t k = 0; k < length; k += 2, b_at += 128) {
      __m512i b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) b[j] = _mm512_loadu_si512(b_at + 32 * j);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        int32_t pair; std::memcpy(&pair, x + i * length + k, 4);
        const __m512i v = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dot_bf16(acc[i][j], v, b[j]);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const int64_t n = panel * 64 + 16 * j;
    if (n >= a.n) break;
    const __mmask16 m = tail(a.n - n);
    const __m512 bias = a.bias ? BF16::load(static_cast<const uint16_t*>(a.bias) + n, m) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      BF16::store(static_cast<uint16_t*>(a.y) + (row + i) * a.n + n, m, _mm512_add_ps(acc[i][j], bias));
  }
}

extern "C" void qgen_multiply_bf16(const Args* args, const float* table, const float* step, const float* zero) {
  const Args& a = *args;
  if (a.m == 0) return;
  const Plan plan(a);
  parallel(a.threads, 0, [](int64_t) {}, plan.tasks, [&](int64_t task) {
    const int64_t panel = task / plan.chunks, from = task % plan.chunks * plan.rows, to = from + plan.rows < a.m ? from + plan.rows : a.m;
    uint16_t* w = reinterpret_cast<uint16_t*>(scratch<2>(128 * a.kp));
    unpack_table(a, panel, table, step, zero, w);
    int64_t row = from;
    for (; row + 6 <= to; row += 6) tile_bf16<6>(a, row, panel, w);
    for (; row < to; row++) tile_bf16<1>(a, row, panel, w);
  });
}

extern "C" void qgen_parallel(void* p) { parallel_region = reinterpret_cast<Parallel>(p); }

extern "C" void qgen_quantize(const Args* a, int bf16) { if (bf16) linear<BF16>(*a, false, true); else linear<FP32>(*a, false, true); }

// without x, its codes, steps and hidden values are given
extern "C" void qgen_linear(const Args* a, int bf16, int int4) {
  if (bf16) linear<BF16>(*a, int4, false); else linear<FP32>(*a, int4, false);
}
"""
