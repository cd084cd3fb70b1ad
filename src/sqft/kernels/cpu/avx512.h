// Rows by AVX-512: VBMI2 expands by a mask.

#pragma once

#include "row.h"

#ifdef SQFT_X86
namespace {

inline AVX512 __mmask64 first(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// A group's stored integers, one a byte. Far from the end whole registers are read, near it only what is there.
template <Kind kind>
inline AVX512 __m512i load_bytes(const uint8_t* values, int count, bool near_end) {
  if constexpr (kind == INT8) {
    return near_end ? _mm512_maskz_loadu_epi8(first(count), values) : _mm512_loadu_si512(values);
  } else {
    const __m256i packed = near_end ? _mm256_maskz_loadu_epi8(__mmask32(first((count + 1) / 2)), values)
                                    : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m512i wide = _mm512_cvtepu8_epi16(packed);  // 0xAB -> 0x00AB -> 0x0A0B
    return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi16(0x0F0F));
  }
}

// Integers: x of a group of 64 columns is rounded to 16 bits, which errs by at most 2^-16 of the group's largest, and the
// products are summed as integers. T groups of x lie ``stride`` columns apart, their steps ``stride`` / 64.
template <Kind kind, int T>
AVX512 void integers_avx512(const Row& row, const Input& x, float* y) {
  const uint8_t* values = row.values;
  __m512 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  const int64_t halves = row.group / 32;
  int64_t g = 0, left = halves;  // halves of a group of 64 that still have this scale
  for (int64_t b = 0; b < row.groups; ++b) {
    const uint64_t mask = row.mask[b];
    const int count = popcount(mask);
    const __m512i stored = _mm512_maskz_expand_epi8(mask, load_bytes<kind>(values, count, row.end - values < 64));
    values += bytes_of(kind, count);
    const int16_t* xb = x.integers + b * WIDTH;
    for (int h = 0; h < 2; ++h) {
      const __mmask32 kept = __mmask32(mask >> (32 * h));
      if (!kept) {  // beyond I there may be no scale
        if (--left == 0) ++g, left = halves;
        continue;
      }
      const __m256i bytes = h ? _mm512_extracti64x4_epi64(stored, 1) : _mm512_castsi512_si256(stored);
      const __m512i level = _mm512_maskz_sub_epi16(kept, _mm512_cvtepu8_epi16(bytes), _mm512_set1_epi16(row.zeros[g]));
      const __m512 scale = _mm512_set1_ps(row.scales[g]);
      if (--left == 0) ++g, left = halves;
      for (int t = 0; t < T; ++t) {
        const __m512i products = _mm512_madd_epi16(level, _mm512_loadu_si512(xb + t * x.stride + 32 * h));
        const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(x.steps[t * x.groups + b]));
        sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), step, sums[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) y[t] = _mm512_reduce_add_ps(sums[t]);
}

// The same of 4 bits where all 64 columns of a group have one scale and zero point, for R rows at once, which hide each
// other's latencies and share x. What takes shuffles is scarce (two of them expand): zero points are subtracted as bytes,
// and factors are multiplied as vectors that loads broadcast. y[r * T + t].
template <int R, int T>
AVX512 void wide_integers_avx512(const Row* rows, const Input& x, float* y) {
  __m512 sums[R][T];
  const uint8_t* values[R];
  for (int r = 0; r < R; ++r) {
    values[r] = rows[r].values;
    for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  const int64_t per = rows->group / WIDTH, groups = rows->groups;
  int64_t g = 0, left = per;
  for (int64_t b = 0; b < groups; ++b) {
    __m512i low[R], high[R];
    __m512 scale[R];
    for (int r = 0; r < R; ++r) {
      const Row& row = rows[r];
      const __mmask64 mask = _load_mask64(const_cast<__mmask64*>(reinterpret_cast<const __mmask64*>(row.mask + b)));
      const int count = popcount(row.mask[b]);
      const __m512i stored = _mm512_maskz_expand_epi8(mask, load_bytes<INT4>(values[r], count, row.end - values[r] < 64));
      values[r] += bytes_of(INT4, count);
      const __m512i level = _mm512_maskz_sub_epi8(mask, stored, _mm512_set1_epi8(char(row.zeros[g])));
      low[r] = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(level));
      high[r] = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(level, 1));
      scale[r] = _mm512_set1_ps(row.scales[g]);
      asm("" : "+v"(scale[r]));  // or the compiler multiplies scalars and shuffles the product
    }
    if (--left == 0) ++g, left = per;
    for (int t = 0; t < T; ++t) {
      const int16_t* xt = x.integers + t * x.stride + b * WIDTH;
      const __m512i one = _mm512_loadu_si512(xt), other = _mm512_loadu_si512(xt + 32);
      const __m512 step = _mm512_set1_ps(x.steps[t * x.groups + b]);
      for (int r = 0; r < R; ++r) {
        const __m512i products = _mm512_dpwssd_epi32(_mm512_madd_epi16(low[r], one), high[r], other);
        sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_mul_ps(scale[r], step), sums[r][t]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) y[r * T + t] = _mm512_reduce_add_ps(sums[r][t]);
}

template <Kind kind, int T>
AVX512 void halves_avx512(const Row& row, const Input& x, float* y) {
  const uint8_t* values = row.values;
  __m512 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
  for (int64_t b = 0; b < row.groups; ++b) {
    for (int h = 0; h < 2; ++h) {
      const __mmask32 kept = __mmask32(row.mask[b] >> (32 * h));
      const int here = popcount(kept);
      const __m512i stored = row.end - values < 64 ? _mm512_maskz_loadu_epi16(__mmask32(first(here)), values)
                                                   : _mm512_loadu_si512(values);
      values += 2 * here;
      const __m512i placed = _mm512_maskz_expand_epi16(kept, stored);
      for (int q = 0; q < 2; ++q) {
        const __m256i half = q ? _mm512_extracti64x4_epi64(placed, 1) : _mm512_castsi512_si256(placed);
        const __m512 w = kind == HALF ? _mm512_cvtph_ps(half)
                                      : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        for (int t = 0; t < T; ++t)
          sums[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x.floats + t * x.stride + b * WIDTH + 32 * h + 16 * q), sums[t]);
      }
    }
  }
  for (int t = 0; t < T; ++t) y[t] = _mm512_reduce_add_ps(sums[t]);
}

template <Kind kind, int T>
void row_avx512(const Row& row, const Input& x, float* y) {
  if constexpr (kind == HALF || kind == BFLOAT)
    halves_avx512<kind, T>(row, x, y);
  else if (kind == INT4 && row.group % WIDTH == 0)
    wide_integers_avx512<1, T>(&row, x, y);
  else
    integers_avx512<kind, T>(row, x, y);
}

// x in 16-bit integers: of each group of 64 the step, the largest over 2^15 - 1, and the nearest multiples of it.
AVX512 void round_to_integers(const float* x, int64_t size, int16_t* integers, float* steps) {
  for (int64_t b = 0; b * WIDTH < size; ++b) {
    __m512 part[4], largest = _mm512_setzero_ps();
    for (int q = 0; q < 4; ++q) {
      part[q] = _mm512_loadu_ps(x + b * WIDTH + 16 * q);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(part[q]));
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 32767.0f / most : 0.0f);
    steps[b] = most / 32767.0f;
    for (int q = 0; q < 4; ++q)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + b * WIDTH + 16 * q),
                          _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(part[q], inverse))));
  }
}

}  // namespace
#endif
