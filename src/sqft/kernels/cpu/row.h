// A row of the compact form, what it is multiplied with, and the portable loop, which is the truth for the others.

#pragma once

#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

}  // namespace

#ifdef SQFT_X86
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,f16c,bmi2")))
#define AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt")))
#endif
