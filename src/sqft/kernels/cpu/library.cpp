// The operators and classes that Python sees.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "compact.h"
#include "decoder.h"

namespace {

// x float32 [T, 64 B], zero beyond I; the rest as of Weight. float32 [T, O].
at::Tensor compact_linear(const at::Tensor& x, const at::Tensor& mask, const at::Tensor& values, const at::Tensor& starts,
                          const at::Tensor& scales, const at::Tensor& zeros, int64_t bits, int64_t group,
                          int64_t variant) {
  const Weight weight(mask, values, starts, scales, zeros, bits, group);
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && x.size(1) == weight.groups * WIDTH,
              "x does not fit the mask");
  TORCH_CHECK(variant >= 0 && variant <= best_variant(), "this processor lacks what the variant needs");
  const Tokens tokens(x.const_data_ptr<float>(), x.size(0), weight.groups, variant, bits != 0);
  at::Tensor y = at::empty({tokens.count, weight.outputs}, x.options());
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, weight.outputs, std::max<int64_t>(1, GRAIN / (weight.groups * WIDTH)),
                   [&](int64_t first, int64_t last) { multiply_rows(weight, tokens, first, last, to); });
  return y;
}

}  // namespace

TORCH_LIBRARY(sqft_cpu, library) {
  library.def("compact_linear", &compact_linear);
  library.def("best_variant", &best_variant);
  library.class_<Decoder>("Decoder")
      .def(torch::init<>())
      .def("configure", &Decoder::configure)
      .def("add_weight", &Decoder::add_weight)
      .def("add_vector", &Decoder::add_vector)
      .def("reserve", &Decoder::reserve)
      .def("keys", &Decoder::keys)
      .def("values", &Decoder::values)
      .def("step", &Decoder::step);
}
