"""Number formats: what the codes and scales of a low-bit tensor mean. One family per file; `qgen.formats.get(name)` finds one.

    file                names                                          codes                        scales
    integer             int{2…8}_g64, _row, int4_tensor, int8_tensor   -(2^(b-1) - 1) … 2^(b-1) - 1 amax: bf16 per block, f32 per row
                        uint{2…8}_g64, _row, uint4_tensor, …           0 … 2^b - 1                  min and max: scale and zero
                        uint4p_g64                                     0 … 15, x >= 0               amax
                        int4_s8_g64                                    int4                         1 … 16 per block, f32 per row
    fp4                 nvfp4, nvfp4_row, nvfp4_dynamic                e2m1                         e4m3 per 16, f32 per tensor or row
                        mxfp4                                          e2m1                         e8m0 per 32
    four_over_six       nvfp4_46, nvfp4_46_row                         e2m1                         as NVFP4, of two the better
    fp8                 fp8_e4m3_row, _tensor, fp8_e5m2_…              e4m3, e5m2                   f32
    minifloat           fp4_{e2m1,e1m2,e3m0}_g64, _row,                4, 6 and 8 bits              bf16 per block, f32 per row
                        fp6_{e2m3,e3m2}_…, fp8_{e4m3,e5m2}_g128
    mx                  mxfp6_{e2m3,e3m2}, mxfp8_{e4m3,e5m2}, mxint8   6 and 8 bits                 e8m0 per 32
                        …_rceil, …_even, …_best, mxfp4_best, …         the same                     the same, chosen otherwise
                        fp4_e2m1_m1_g128                               e2m1                         powers of two (ZeroQuant-FP M1)
    shifted_scales      fp4_e2m1_m2_g128                               e2m1                         shifts of one f32 per row (M2)
    fp6_planes          fp6_42_row                                     e3m2 as nibbles and pairs    f32 per row
    nf4                 nf4_g64, bnb_fp4_g64                           bitsandbytes' tables         f32 amax
    nf4_dq              nf4_g64_dq                                     nf4                          8-bit codes of amax
    ternary             ternary_g64, _row, binary_g64, _row            -1 0 1; -1 1                 least squares
    multibasis          binary2_g64, binary3_row, …                    sums of ±1                   means of what is left, one per basis
    powers              pot{3,4}_g64, apot{3,4,5}_g64, _row            powers of two, sums of two   amax
    log2                log2_{3,4,5,8}_row, logsqrt2_…                 2^-q, 2^(-q/2), x >= 0       f32 maximum
    power               power{3,4,6,8}_row, _g64                       ±(q / m)^(1 / a)             amax; a per tensor
    bitmod              bitmod4_g128, bitmod3_g128                     four tables                  bf16 and a choice per block
    lut                 lut{2,3,4}_row                                 a learned table per row      f32 per row
    vq                  vq2_d4, vq2_d2, vq3_d2, vq1_d8, …              entries of a codebook        f32 per row
    planes              planes{1…8}_g64, _row                          middles of cells, bit planes amax
    peers               int4_g32_f16, uint4z_g128, int4o_g64_f32, …    integers                     as other projects' files have them

A format is one file: an Element if the grid is new, a NumberFormat, and `formats.add(name, it)`. Weights, activations per token (rows) and
whatever else has rows of K values go through the same calls. Kernels serve the formats they name; `plain` ones can be served by any that
reads a table of values, all others by those that call `dequantize`.
"""

from qgen.formats.base import Element, Irregular, NumberFormat, QTensor, formats, get, padded

__all__ = ["Element", "Irregular", "NumberFormat", "QTensor", "formats", "get", "padded"]
