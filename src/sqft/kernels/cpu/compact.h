// y = x W^T for a weight in compact form (kernels/compact.py): a bit a weight says which are stored, in groups of 64
// columns, and those lie one after the other. Three variants of one loop: AVX-512 (VBMI2 expands by a mask), AVX2 with
// BMI2, and portable C++, chosen when the library is loaded. Sums are in float32.
//
// A row is walked once for up to eight tokens: its weights are decoded, 16 columns at a time, and multiplied with each.
// Shape letters: T tokens, O output features, I input features, B = ceil(I / 64) groups, G groups of the grid.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SQFT_X86 1
#include <immintrin.h>
#endif

namespace {

constexpr int WIDTH = 64;
constexpr int TOKENS = 8;
constexpr int PAIR = 2;  // rows at once, of one token
constexpr int64_t GRAIN = 16384;  // weights that are worth a thread

struct Row {
  const uint64_t* mask;  // [B]
  const uint8_t* values;
  const uint8_t* end;    // of all rows: nothing behind it may be read
  const float* scales;   // [G], integers only
  const uint8_t* zeros;  // [G]
  int64_t groups;        // B
  int64_t group;         // columns that share a scale
};

// Rows of x, ``stride`` floats apart and zero beyond I; and, where the variant multiplies integers, what they are in
// 16 bits, and the step of each group of 64.
struct Input {
  const float* floats;
  const int16_t* integers;
  const float* steps;
  int64_t stride, groups;
};

enum Kind { INT4, INT8, HALF, BFLOAT };

inline int popcount(uint64_t word) { return __builtin_popcountll(word); }

inline int64_t bytes_of(Kind kind, int count) {
  return kind == INT4 ? (count + 1) / 2 : kind == INT8 ? count : 2 * count;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <Kind kind>
inline float decode(const uint8_t* values, int k) {
  if constexpr (kind == INT4) return float((values[k / 2] >> (4 * (k % 2))) & 15);
  if constexpr (kind == INT8) return float(values[k]);
  uint16_t bits;
  std::memcpy(&bits, values + 2 * k, 2);
  if constexpr (kind == BFLOAT) return from_bits(uint32_t(bits) << 16);
  return c10::detail::fp16_ieee_to_fp32_value(bits);
}

// The truth for the other two: bit after bit.
template <Kind kind, int T>
void row_portable(const Row& row, const Input& x, float* y) {
  const uint8_t* values = row.values;
  float sums[T] = {};
  for (int64_t b = 0; b < row.groups; ++b) {
    int k = 0;
    for (uint64_t word = row.mask[b]; word; word &= word - 1, ++k) {
      const int64_t column = b * WIDTH + __builtin_ctzll(word);
      float w = decode<kind>(values, k);
      if constexpr (kind == INT4 || kind == INT8) {
        const int64_t g = column / row.group;
        w = (w - row.zeros[g]) * row.scales[g];
      }
      for (int t = 0; t < T; ++t) sums[t] += w * x.floats[t * x.stride + column];
    }
    values += bytes_of(kind, k);
  }
  for (int t = 0; t < T; ++t) y[t] = sums[t];
}

#ifdef SQFT_X86
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,bmi2")))
#define AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))

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

// Where the k-th stored value of 8 columns goes: of each byte of a mask the source of each column.
struct Places {
  alignas(32) int32_t source[256][8];
  Places() {
    for (int byte = 0; byte < 256; ++byte)
      for (int column = 0, k = 0; column < 8; ++column) source[byte][column] = (byte >> column) & 1 ? k++ : 0;
  }
};
const Places PLACES;

inline AVX2 float sum_of(__m256 lanes) {
  alignas(32) float values[8];
  _mm256_store_ps(values, lanes);
  float sum = 0;
  for (float value : values) sum += value;
  return sum;
}

// A group's 64 integers of 4 bits, each at its column, the zero point where none is stored: 16 of them are put in their places
// by one instruction, pdep. Reads up to 41 bytes.
inline AVX2 __m256i place_nibbles(const uint8_t* values, uint64_t mask, uint64_t zero) {
  constexpr uint64_t ONES = 0x1111111111111111ull;
  if (mask == ~0ull) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const uint64_t zeros = zero * ONES;
  uint64_t words[4];
  for (int p = 0, before = 0; p < 4; ++p) {
    const uint64_t part = mask >> (16 * p) & 0xFFFF, ones = _pdep_u64(part, ONES), fields = (ones << 4) - ones;
    uint64_t stored;
    std::memcpy(&stored, values + before / 2, 8);
    stored >>= 4 * (before % 2);
    if (part == 0xFFFF && before % 2) stored |= uint64_t(values[before / 2 + 8]) << 60;  // the last of 16
    words[p] = _pdep_u64(stored ^ zeros, fields);
    before += popcount(part);
  }
  const __m256i placed = _mm256_set_epi64x(int64_t(words[3]), int64_t(words[2]), int64_t(words[1]), int64_t(words[0]));
  return _mm256_xor_si256(placed, _mm256_set1_epi64x(int64_t(zeros)));
}

// As ``wide_integers_avx512``. Every fourth column is a field of the same 16-bit lanes, so x lies in that order.
template <int T>
AVX2 void wide_integers_avx2(const Row& row, const Input& x, float* y) {
  const uint8_t* values = row.values;
  __m256 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  uint8_t safe[48] = {};
  const __m256i field = _mm256_set1_epi16(15);
  const int64_t per = row.group / WIDTH;
  int64_t g = 0, left = per;
  for (int64_t b = 0; b < row.groups; ++b) {
    const uint8_t* from = values;
    if (row.end - values < 41) from = safe, std::memcpy(safe, values, size_t(row.end - values));
    const __m256i placed = place_nibbles(from, row.mask[b], row.zeros[g]), zero = _mm256_set1_epi16(row.zeros[g]);
    values += bytes_of(INT4, popcount(row.mask[b]));
    const __m256i level[4] = {_mm256_sub_epi16(_mm256_and_si256(placed, field), zero),
                              _mm256_sub_epi16(_mm256_and_si256(_mm256_srli_epi16(placed, 4), field), zero),
                              _mm256_sub_epi16(_mm256_and_si256(_mm256_srli_epi16(placed, 8), field), zero),
                              _mm256_sub_epi16(_mm256_srli_epi16(placed, 12), zero)};
    for (int t = 0; t < T; ++t) {
      const auto* xt = reinterpret_cast<const __m256i*>(x.integers + t * x.stride + b * WIDTH);
      __m256i products = _mm256_madd_epi16(level[0], _mm256_loadu_si256(xt));
      for (int k = 1; k < 4; ++k)
        products = _mm256_add_epi32(products, _mm256_madd_epi16(level[k], _mm256_loadu_si256(xt + k)));
      const __m256 step = _mm256_set1_ps(row.scales[g] * x.steps[t * x.groups + b]);
      sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), step, sums[t]);
    }
    if (--left == 0) ++g, left = per;
  }
  for (int t = 0; t < T; ++t) y[t] = sum_of(sums[t]);
}

template <Kind kind, int T>
AVX2 void row_avx2(const Row& row, const Input& x, float* y) {
  if constexpr (kind == INT4)
    if (row.group % WIDTH == 0) return wide_integers_avx2<T>(row, x, y);
  const uint8_t* values = row.values;
  __m256 sums[T];
  for (int t = 0; t < T; ++t) sums[t] = _mm256_setzero_ps();
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const int64_t eighths = row.group / 8;
  int64_t g = -1, left = 1;
  for (int64_t b = 0; b < row.groups; ++b) {
    const uint64_t mask = row.mask[b];
    int before = 0;
    for (int p = 0; p < 8; ++p) {
      const int byte = int(mask >> (8 * p)) & 255;
      if (--left == 0) ++g, left = eighths;
      if (!byte) continue;
      const int here = popcount(byte);
      const uint8_t* from = values + (kind == INT4 ? before / 2 : bytes_of(kind, before));
      const int64_t size = kind == INT4 ? (before % 2 + here + 1) / 2 : bytes_of(kind, here);
      uint8_t safe[16];
      if (row.end - from < 16) {
        std::memcpy(safe, from, size);
        from = safe;
      }
      __m256 w;
      if constexpr (kind == INT4 || kind == INT8) {
        uint64_t bytes;
        std::memcpy(&bytes, from, 8);
        if constexpr (kind == INT4) bytes = _pdep_u64(bytes >> (4 * (before % 2)), 0x0F0F0F0F0F0F0F0Full);
        const __m256i level = _mm256_sub_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))),
                                               _mm256_set1_epi32(row.zeros[g]));
        w = _mm256_mul_ps(_mm256_cvtepi32_ps(level), _mm256_set1_ps(row.scales[g]));
      } else {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        w = kind == HALF ? _mm256_cvtph_ps(halves)
                         : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
      }
      w = _mm256_permutevar8x32_ps(w, _mm256_load_si256(reinterpret_cast<const __m256i*>(PLACES.source[byte])));
      const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(byte), bit), bit);
      w = _mm256_and_ps(w, _mm256_castsi256_ps(kept));
      for (int t = 0; t < T; ++t)
        sums[t] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x.floats + t * x.stride + b * WIDTH + 8 * p), sums[t]);
      before += here;
    }
    values += bytes_of(kind, before);
  }
  for (int t = 0; t < T; ++t) y[t] = sum_of(sums[t]);
}
#endif

enum Variant { PORTABLE, WITH_AVX2, WITH_AVX512 };

int64_t best_variant() {
#ifdef SQFT_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return WITH_AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma")) return WITH_AVX2;
#endif
  return PORTABLE;
}

// x in 16-bit integers: of each group of 64 the step, the largest over 2^15 - 1, and the nearest multiples of it.
#ifdef SQFT_X86
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

// The same, in the order that ``wide_integers_avx2`` wants: columns 0, 4, 8 ... of a group, then 1, 5, 9 ...
AVX2 void round_to_fourths(const float* x, int64_t size, int16_t* integers, float* steps) {
  for (int64_t b = 0; b * WIDTH < size; ++b, x += WIDTH, integers += WIDTH) {
    float most = 0;
    for (int i = 0; i < WIDTH; ++i) most = std::max(most, std::abs(x[i]));
    const __m256 inverse = _mm256_set1_ps(most > 0 ? 32767.0f / most : 0.0f);
    steps[b] = most / 32767.0f;
    alignas(32) int32_t rounded[WIDTH];
    for (int i = 0; i < WIDTH; i += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(rounded + i),
                         _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
    for (int i = 0; i < WIDTH; ++i) integers[i % 4 * 16 + i / 4] = int16_t(rounded[i]);
  }
}
#endif

using Multiply = void (*)(const Row&, const Input&, float*);

template <Kind kind, int T>
Multiply of_variant(int64_t variant) {
#ifdef SQFT_X86
  if (variant == WITH_AVX512) return row_avx512<kind, T>;
  if (variant == WITH_AVX2) return row_avx2<kind, T>;
#endif
  return row_portable<kind, T>;
}

template <Kind kind>
Multiply of_tokens(int64_t variant, int64_t tokens) {
  switch (tokens) {
    case 1: return of_variant<kind, 1>(variant);
    case 2: return of_variant<kind, 2>(variant);
    case 4: return of_variant<kind, 4>(variant);
    default: return of_variant<kind, 8>(variant);
  }
}

Multiply pick(Kind kind, int64_t variant, int64_t tokens) {
  switch (kind) {
    case INT4: return of_tokens<INT4>(variant, tokens);
    case INT8: return of_tokens<INT8>(variant, tokens);
    case HALF: return of_tokens<HALF>(variant, tokens);
    default: return of_tokens<BFLOAT>(variant, tokens);
  }
}

// A weight in compact form. mask int64 [O, B]; values as they lie; starts int64 [O + 1]; of integers of 4 or 8 bits scales
// float32 and zeros uint8 [O, G], of halves both empty.
struct Weight {
  at::Tensor mask, values, starts, scales, zeros;
  int64_t bits, group, outputs, groups, grid, size;
  Kind kind;

  Weight(at::Tensor mask_, at::Tensor values_, at::Tensor starts_, at::Tensor scales_, at::Tensor zeros_, int64_t bits_,
         int64_t group_)
      : mask(std::move(mask_)), values(std::move(values_)), starts(std::move(starts_)), scales(std::move(scales_)),
        zeros(std::move(zeros_)), bits(bits_), group(group_), outputs(mask.size(0)), groups(mask.size(1)) {
    const bool integers = bits != 0;
    TORCH_CHECK(mask.is_contiguous() && values.is_contiguous() && starts.is_contiguous() && starts.numel() == outputs + 1,
                "the compact form is not contiguous");
    TORCH_CHECK(!integers || ((bits == 4 || bits == 8) && group > 0 && group % 32 == 0 && scales.is_contiguous() &&
                              zeros.is_contiguous() && scales.size(0) == outputs && scales.sizes() == zeros.sizes() &&
                              (scales.size(1) - 1) * group < groups * WIDTH && groups * WIDTH - 64 < scales.size(1) * group),
                "this grid has no kernel");
    kind = bits == 4 ? INT4 : bits == 8 ? INT8 : values.scalar_type() == at::kHalf ? HALF : BFLOAT;
    TORCH_CHECK(integers ? values.scalar_type() == at::kByte
                         : values.scalar_type() == at::kHalf || values.scalar_type() == at::kBFloat16,
                "no kernel for this dtype");
    TORCH_CHECK(starts.data_ptr<int64_t>()[outputs] == values.numel(), "the values do not fit the mask");
    size = integers ? 1 : 2;
    grid = integers ? scales.size(1) : 0;
  }
};

// Some tokens' x, 64 B floats each and zero beyond I, as all variants want it.
struct Tokens {
  const float* x;
  int64_t count, groups, variant;
  std::vector<int16_t> integers;
  std::vector<float> steps;

  Tokens(const float* x_, int64_t count_, int64_t groups_, int64_t variant_, bool rounded)
      : x(x_), count(count_), groups(groups_), variant(variant_) {
    if (!rounded || variant == PORTABLE) return;
    integers.resize(count * groups * WIDTH);
    steps.resize(count * groups);
#ifdef SQFT_X86
    (variant == WITH_AVX512 ? round_to_integers : round_to_fourths)(x, count * groups * WIDTH, integers.data(), steps.data());
#endif
  }
};

// Rows [first, last) of y [T, O] = x W^T.
void multiply_rows(const Weight& w, const Tokens& tokens, int64_t first_row, int64_t last_row, float* y) {
  const auto* begin = static_cast<const uint8_t*>(w.values.const_data_ptr());
  const uint8_t* end = begin + w.values.numel() * w.size;
  const auto* words = reinterpret_cast<const uint64_t*>(w.mask.const_data_ptr<int64_t>());
  const int64_t* start = w.starts.const_data_ptr<int64_t>();
  const float* scales = w.bits ? w.scales.const_data_ptr<float>() : nullptr;
  const uint8_t* zeros = w.bits ? w.zeros.const_data_ptr<uint8_t>() : nullptr;
  for (int64_t done = 0; done < tokens.count;) {
    const int64_t left = tokens.count - done, now = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const Multiply multiply = pick(w.kind, tokens.variant, now);
    const Input input{tokens.x + done * w.groups * WIDTH, tokens.integers.data() + done * w.groups * WIDTH,
                      tokens.steps.data() + done * w.groups, w.groups * WIDTH, w.groups};
    const auto row = [&](int64_t o) {
      return Row{words + o * w.groups, begin + start[o] * w.size, end, scales + o * w.grid, zeros + o * w.grid, w.groups,
                 w.group};
    };
    int64_t o = first_row;
#ifdef SQFT_X86
    if (tokens.variant == WITH_AVX512 && w.kind == INT4 && w.group % WIDTH == 0 && now == 1)
      for (; o + PAIR <= last_row; o += PAIR) {
        Row rows[PAIR];
        for (int r = 0; r < PAIR; ++r) rows[r] = row(o + r);
        wide_integers_avx512<PAIR, 1>(rows, input, y + done * w.outputs + o);
      }
#endif
    float sums[TOKENS];
    for (; o < last_row; ++o) {
      multiply(row(o), input, sums);
      for (int64_t t = 0; t < now; ++t) y[(done + t) * w.outputs + o] = sums[t];
    }
    done += now;
  }
}

}  // namespace
