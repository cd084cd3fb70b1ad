// One token through a decoder of Llama's kind, in one call: RMS norms, rotary positions, grouped-query attention over a
// cache of keys and values, SwiGLU; optionally norms of queries and keys, and biases. Weights are in compact form, all
// else is float32. What it computes is what transformers' modules do; it saves the hundreds of calls between them.

#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/custom_class.h>

#include "compact.h"

namespace {

#if defined(SQFT_X86) && defined(__gnu_linux__)
#define WIDE __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define WIDE
#endif

WIDE void rms_norm(const float* x, const float* gain, int64_t size, float eps, float* y) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(squares / float(size) + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = gain[i] * (x[i] * inverse);
}

WIDE void add(float* x, const float* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) x[i] += y[i];
}

// x silu(gate), gate and x of the same size.
void swiglu(const float* gate, const float* x, int64_t size, float* y) {
  for (int64_t i = 0; i < size; ++i) y[i] = x[i] * gate[i] / (1.0f + std::exp(-gate[i]));
}

// One head: keys and values [count, size] so far; scores is scratch of count.
WIDE void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t size, float scale,
                 float* scores, float* y) {
  float most = -INFINITY, sum = 0;
  for (int64_t t = 0; t < count; ++t) {
    float score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t i = 0; i < size; ++i) score += query[i] * keys[t * size + i];
    scores[t] = score * scale;
    most = std::max(most, scores[t]);
  }
  for (int64_t t = 0; t < count; ++t) sum += scores[t] = std::exp(scores[t] - most);
  for (int64_t i = 0; i < size; ++i) y[i] = 0;
  for (int64_t t = 0; t < count; ++t) {
    const float weight = scores[t] / sum;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) y[i] += weight * values[t * size + i];
  }
}

// Floats with zeros up to a multiple of 64.
std::vector<float> padded(int64_t size) { return std::vector<float>((size + WIDTH - 1) / WIDTH * WIDTH); }

// Products of the same tokens with several weights, in one parallel loop over the rows of all.
void multiply_all(const std::vector<const Weight*>& weights, const std::vector<float*>& results, const std::vector<float>& x,
                  int64_t variant) {
  const int64_t groups = weights[0]->groups;
  int64_t rows = 0;
  bool rounded = false;
  for (const Weight* w : weights) rows += w->outputs, rounded |= w->bits != 0;
  const Tokens tokens(x.data(), 1, groups, variant, rounded);
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (groups * WIDTH)), [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (size_t i = 0; i < weights.size(); before += weights[i]->outputs, ++i) {
      const int64_t from = std::max<int64_t>(first - before, 0), to = std::min(last - before, weights[i]->outputs);
      if (from < to) multiply_rows(*weights[i], tokens, from, to, results[i]);
    }
  });
}

struct Decoder : torch::CustomClassHolder {
  // Before the first step: the shape, then for each layer its weights (q, k, v, o, gate, up, down, each with a bias or an
  // empty one) and vectors (both norms, norms of queries and keys or empty ones), then the last norm and the head.
  void configure(int64_t heads, int64_t kv_heads, int64_t size, double eps, double rotary_scale, at::Tensor embedding,
                 at::Tensor inverse_frequencies) {
    heads_ = heads, kv_heads_ = kv_heads, size_ = size, eps_ = float(eps), rotary_scale_ = float(rotary_scale);
    embedding_ = std::move(embedding), frequencies_ = floats(inverse_frequencies);
    TORCH_CHECK(frequencies_.numel() == size / 2 && heads % kv_heads == 0, "the heads do not fit");
    variant_ = best_variant();
  }
  void add_weight(at::Tensor mask, at::Tensor values, at::Tensor starts, at::Tensor scales, at::Tensor zeros, int64_t bits,
                  int64_t group, const at::Tensor& bias) {
    weights_.emplace_back(std::move(mask), std::move(values), std::move(starts), std::move(scales), std::move(zeros), bits,
                          group);
    biases_.push_back(floats(bias));
  }
  void add_vector(const at::Tensor& vector) { vectors_.push_back(floats(vector)); }

  // Room for so many positions; what is in the cache stays.
  void reserve(int64_t capacity) {
    const int64_t layers = int64_t(weights_.size()) / 7;
    const std::vector<int64_t> shape{layers, kv_heads_, capacity, size_};
    at::Tensor keys = at::zeros(shape), values = at::zeros(shape);
    if (keys_.defined()) {
      const int64_t kept = std::min(capacity, keys_.size(2));
      keys.narrow(2, 0, kept).copy_(keys_.narrow(2, 0, kept));
      values.narrow(2, 0, kept).copy_(values_.narrow(2, 0, kept));
    }
    keys_ = keys, values_ = values;
  }
  at::Tensor keys() { return keys_; }
  at::Tensor values() { return values_; }

  // The logits, float32 [V], after ``token`` at ``position``, which is the number of positions that are in the cache.
  at::Tensor step(int64_t token, int64_t position) {
    TORCH_CHECK(keys_.defined() && position >= 0 && position < keys_.size(2), "reserve room for the position first");
    TORCH_CHECK(token >= 0 && token < embedding_.size(0), "there is no such token");
    const int64_t hidden = embedding_.size(1), layers = int64_t(weights_.size()) / 7, half = size_ / 2;
    const at::Tensor row = floats(embedding_.select(0, token));
    std::vector<float> h(row.const_data_ptr<float>(), row.const_data_ptr<float>() + hidden), x = padded(hidden);
    std::vector<float> cosine(half), sine(half), out(hidden);
    for (int64_t i = 0; i < half; ++i) {
      const float angle = float(position) * frequencies_.const_data_ptr<float>()[i];
      cosine[i] = std::cos(angle) * rotary_scale_, sine[i] = std::sin(angle) * rotary_scale_;
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      rms_norm(h.data(), vector(4 * layer), hidden, eps_, x.data());
      attention(layer, position, x, cosine, sine, out);
      add(h.data(), out.data(), hidden);
      rms_norm(h.data(), vector(4 * layer + 1), hidden, eps_, x.data());
      mlp(layer, x, out);
      add(h.data(), out.data(), hidden);
    }
    rms_norm(h.data(), vector(4 * layers), hidden, eps_, x.data());
    at::Tensor logits = at::empty({weights_.back().outputs});
    multiply_all({&weights_.back()}, {logits.mutable_data_ptr<float>()}, x, variant_);
    biased(int64_t(weights_.size()) - 1, logits.mutable_data_ptr<float>());
    return logits;
  }

 private:
  static at::Tensor floats(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }
  const float* vector(int64_t index) const {
    return vectors_[index].numel() ? vectors_[index].const_data_ptr<float>() : nullptr;
  }
  void biased(int64_t weight, float* y) const {
    if (biases_[weight].numel()) add(y, biases_[weight].const_data_ptr<float>(), biases_[weight].numel());
  }

  void attention(int64_t layer, int64_t position, const std::vector<float>& x, const std::vector<float>& cosine,
                 const std::vector<float>& sine, std::vector<float>& out) {
    const int64_t capacity = keys_.size(2), first = 7 * layer;
    std::vector<float> q(heads_ * size_), k(kv_heads_ * size_), v(kv_heads_ * size_), mixed = padded(heads_ * size_);
    multiply_all({&weights_[first], &weights_[first + 1], &weights_[first + 2]}, {q.data(), k.data(), v.data()}, x, variant_);
    biased(first, q.data()), biased(first + 1, k.data()), biased(first + 2, v.data());
    for (int64_t head = 0; head < heads_; ++head) turn(q.data() + head * size_, vector(4 * layer + 2), cosine, sine);
    float* keys = keys_.mutable_data_ptr<float>() + layer * kv_heads_ * capacity * size_;
    float* values = values_.mutable_data_ptr<float>() + layer * kv_heads_ * capacity * size_;
    for (int64_t head = 0; head < kv_heads_; ++head) {
      turn(k.data() + head * size_, vector(4 * layer + 3), cosine, sine);
      const int64_t place = (head * capacity + position) * size_;
      std::copy_n(k.data() + head * size_, size_, keys + place);
      std::copy_n(v.data() + head * size_, size_, values + place);
    }
    const int64_t shared = heads_ / kv_heads_, count = position + 1;
    at::parallel_for(0, heads_, std::max<int64_t>(1, 4 * GRAIN / (count * size_)), [&](int64_t from, int64_t to) {
      std::vector<float> scores(count);
      for (int64_t head = from; head < to; ++head) {
        const int64_t place = head / shared * capacity * size_;
        attend(q.data() + head * size_, keys + place, values + place, count, size_, 1.0f / std::sqrt(float(size_)),
               scores.data(), mixed.data() + head * size_);
      }
    });
    multiply_all({&weights_[first + 3]}, {out.data()}, mixed, variant_);
    biased(first + 3, out.data());
  }

  // A head of q or k: normed if there is a gain, and turned to its position.
  void turn(float* head, const float* gain, const std::vector<float>& cosine, const std::vector<float>& sine) const {
    if (gain) rms_norm(head, gain, size_, eps_, head);
    const int64_t half = size_ / 2;
    for (int64_t i = 0; i < half; ++i) {
      const float one = head[i], other = head[i + half];
      head[i] = one * cosine[i] - other * sine[i];
      head[i + half] = other * cosine[i] + one * sine[i];
    }
  }

  void mlp(int64_t layer, const std::vector<float>& x, std::vector<float>& out) const {
    const Weight &gate = weights_[7 * layer + 4], &up = weights_[7 * layer + 5];
    std::vector<float> opened(gate.outputs), lifted(up.outputs), product = padded(gate.outputs);
    multiply_all({&gate, &up}, {opened.data(), lifted.data()}, x, variant_);
    biased(7 * layer + 4, opened.data()), biased(7 * layer + 5, lifted.data());
    swiglu(opened.data(), lifted.data(), gate.outputs, product.data());
    multiply_all({&weights_[7 * layer + 6]}, {out.data()}, product, variant_);
    biased(7 * layer + 6, out.data());
  }

  int64_t heads_ = 0, kv_heads_ = 0, size_ = 0, variant_ = 0;
  float eps_ = 0, rotary_scale_ = 1;
  at::Tensor embedding_, frequencies_, keys_, values_;
  std::vector<Weight> weights_;
  std::vector<at::Tensor> biases_, vectors_;
};

}  // namespace
