// Rows by AVX2 and BMI2.

#pragma once

#include "row.h"

#ifdef SQFT_X86
namespace {

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

// As ``wide_integers_avx512`` of avx512.h, a row at a time. Every fourth column is a field of the same 16-bit lanes, so x lies in that order.
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

// As ``round_to_integers`` of avx512.h, in the order that ``wide_integers_avx2`` wants: columns 0, 4, 8 ... of a group, then
// 1, 5, 9 ...
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

}  // namespace
#endif
