// y = x W^T for a weight in compact form (kernels/compact.py): a bit a weight says which are stored, in groups of 64
// columns, and those lie one after the other. Three variants of one loop: AVX-512 (VBMI2 expands by a mask), AVX2 with
// BMI2, and portable C++, chosen when the library is loaded. Sums are in float32.
//
// A row is walked once for up to eight tokens: its weights are decoded, 16 columns at a time, and multiplied with each.
// Shape letters: T tokens, O output features, I input features, B = ceil(I / 64) groups, G groups of the grid.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "row.h"

namespace {

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
