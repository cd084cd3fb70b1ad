// One token of each of some sequences through a decoder of Llama's kind, in one call: RMS norms, rotary positions, grouped-query attention over a
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

// A vector of each of some tokens, [T, size], with zeros up to a multiple of 64 as the products take them.
struct Vectors {
  int64_t count, width;
  std::vector<float> all;

  Vectors(int64_t count_, int64_t size)
      : count(count_), width((size + WIDTH - 1) / WIDTH * WIDTH), all(count * width) {}
  float* of(int64_t token) { return all.data() + token * width; }
};

// Products of the same tokens with several weights, in one parallel loop over the rows of all.
void multiply_all(const std::vector<const Weight*>& weights, const std::vector<float*>& results, const Vectors& x,
                  int64_t variant) {
  const int64_t groups = weights[0]->groups;
  int64_t rows = 0;
  bool rounded = false;
  for (const Weight* w : weights) rows += w->outputs, rounded |= w->bits != 0;
  const Tokens tokens(x.all.data(), x.count, groups, variant, rounded);
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

  // An empty cache of so many sequences, with room for so many positions of each.
  void reserve(int64_t sequences, int64_t capacity) {
    const std::vector<int64_t> shape{int64_t(weights_.size()) / 7, sequences, kv_heads_, capacity, size_};
    keys_ = at::zeros(shape), values_ = at::zeros(shape);
  }
  at::Tensor keys() { return keys_; }
  at::Tensor values() { return values_; }

  // The logits, float32 [T, V], after a token of each of T sequences; a position is how many of its tokens are in the cache.
  at::Tensor step(const std::vector<int64_t>& sequences, const std::vector<int64_t>& tokens,
                  const std::vector<int64_t>& positions) {
    const int64_t count = int64_t(tokens.size()), hidden = embedding_.size(1), layers = int64_t(weights_.size()) / 7;
    TORCH_CHECK(count > 0 && sequences.size() == tokens.size() && positions.size() == tokens.size(), "lengths differ");
    Step now{sequences, positions, std::vector<float>(count * size_ / 2), std::vector<float>(count * size_ / 2)};
    Vectors h(count, hidden), x(count, hidden);
    std::vector<float> out(count * hidden);
    for (int64_t t = 0; t < count; ++t) {
      TORCH_CHECK(keys_.defined() && positions[t] >= 0 && positions[t] < keys_.size(3), "reserve room for the position first");
      TORCH_CHECK(sequences[t] >= 0 && sequences[t] < keys_.size(1), "there is no such sequence");
      TORCH_CHECK(tokens[t] >= 0 && tokens[t] < embedding_.size(0), "there is no such token");
      const at::Tensor row = floats(embedding_.select(0, tokens[t]));
      std::copy_n(row.const_data_ptr<float>(), hidden, h.of(t));
      rotate(now, t);
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      norm(h, 4 * layer, x);
      attention(layer, now, x, out.data());
      sum(h, out.data());
      norm(h, 4 * layer + 1, x);
      mlp(layer, x, out.data());
      sum(h, out.data());
    }
    norm(h, 4 * layers, x);
    at::Tensor logits = at::empty({count, weights_.back().outputs});
    multiply(int64_t(weights_.size()) - 1, 1, {logits.mutable_data_ptr<float>()}, x);
    return logits;
  }

 private:
  static at::Tensor floats(const at::Tensor& tensor) { return tensor.to(at::kFloat).contiguous(); }
  const float* vector(int64_t index) const {
    return vectors_[index].numel() ? vectors_[index].const_data_ptr<float>() : nullptr;
  }
  // Of each token: its sequence, its position, and the cosines and sines of its angles.
  struct Step {
    const std::vector<int64_t>&sequences, &positions;
    std::vector<float> cosine, sine;
  };
  void rotate(Step& now, int64_t t) const {
    for (int64_t i = 0, half = size_ / 2; i < half; ++i) {
      const float angle = float(now.positions[t]) * frequencies_.const_data_ptr<float>()[i];
      now.cosine[t * half + i] = std::cos(angle) * rotary_scale_, now.sine[t * half + i] = std::sin(angle) * rotary_scale_;
    }
  }
  void norm(Vectors& h, int64_t gain, Vectors& x) const {
    for (int64_t t = 0; t < h.count; ++t) rms_norm(h.of(t), vector(gain), embedding_.size(1), eps_, x.of(t));
  }
  void sum(Vectors& h, const float* out) const {
    for (int64_t t = 0, hidden = embedding_.size(1); t < h.count; ++t) add(h.of(t), out + t * hidden, hidden);
  }

  // Products with some weights from ``first`` on, with their biases: [T, O] each.
  void multiply(int64_t first, int64_t number, const std::vector<float*>& results, const Vectors& x) const {
    std::vector<const Weight*> some;
    for (int64_t i = first; i < first + number; ++i) some.push_back(&weights_[i]);
    multiply_all(some, results, x, variant_);
    for (int64_t i = 0; i < number; ++i)
      if (const int64_t outputs = biases_[first + i].numel())
        for (int64_t t = 0; t < x.count; ++t) add(results[i] + t * outputs, biases_[first + i].const_data_ptr<float>(), outputs);
  }

  void attention(int64_t layer, const Step& now, const Vectors& x, float* out) {
    const int64_t first = 7 * layer, count = x.count, shared = heads_ / kv_heads_;
    std::vector<float> q(count * heads_ * size_), k(count * kv_heads_ * size_), v(count * kv_heads_ * size_);
    Vectors mixed(count, heads_ * size_);
    multiply(first, 3, {q.data(), k.data(), v.data()}, x);
    int64_t longest = 0;
    for (int64_t t = 0; t < count; ++t) {
      longest = std::max(longest, now.positions[t] + 1);
      for (int64_t head = 0; head < heads_; ++head) turn(&q[(t * heads_ + head) * size_], vector(4 * layer + 2), now, t);
      for (int64_t head = 0; head < kv_heads_; ++head) {
        const int64_t from = (t * kv_heads_ + head) * size_, to = place(layer, now.sequences[t], head) + now.positions[t] * size_;
        turn(&k[from], vector(4 * layer + 3), now, t);
        std::copy_n(&k[from], size_, keys_.mutable_data_ptr<float>() + to);
        std::copy_n(&v[from], size_, values_.mutable_data_ptr<float>() + to);
      }
    }
    const float *keys = keys_.const_data_ptr<float>(), *values = values_.const_data_ptr<float>();
    at::parallel_for(0, count * heads_, std::max<int64_t>(1, 4 * GRAIN / (longest * size_)), [&](int64_t from, int64_t to) {
      std::vector<float> scores(longest);
      for (int64_t i = from; i < to; ++i) {
        const int64_t t = i / heads_, head = i % heads_, at = place(layer, now.sequences[t], head / shared);
        attend(&q[i * size_], keys + at, values + at, now.positions[t] + 1, size_, 1.0f / std::sqrt(float(size_)),
               scores.data(), mixed.of(t) + head * size_);
      }
    });
    multiply(first + 3, 1, {out}, mixed);
  }
  // Where a head's keys and values of a sequence begin.
  int64_t place(int64_t layer, int64_t sequence, int64_t head) const {
    return ((layer * keys_.size(1) + sequence) * kv_heads_ + head) * keys_.size(3) * size_;
  }

  // A head of q or k: normed if there is a gain, and turned to its position.
  void turn(float* head, const float* gain, const Step& now, int64_t t) const {
    if (gain) rms_norm(head, gain, size_, eps_, head);
    const int64_t half = size_ / 2;
    const float *cosine = &now.cosine[t * half], *sine = &now.sine[t * half];
    for (int64_t i = 0; i < half; ++i) {
      const float one = head[i], other = head[i + half];
      head[i] = one * cosine[i] - other * sine[i];
      head[i + half] = other * cosine[i] + one * sine[i];
    }
  }

  void mlp(int64_t layer, const Vectors& x, float* out) const {
    const int64_t first = 7 * layer + 4, size = weights_[first].outputs;
    std::vector<float> opened(x.count * size), lifted(x.count * size);
    Vectors product(x.count, size);
    multiply(first, 2, {opened.data(), lifted.data()}, x);
    for (int64_t t = 0; t < x.count; ++t) swiglu(&opened[t * size], &lifted[t * size], size, product.of(t));
    multiply(first + 2, 1, {out}, product);
  }

  int64_t heads_ = 0, kv_heads_ = 0, size_ = 0, variant_ = 0;
  float eps_ = 0, rotary_scale_ = 1;
  at::Tensor embedding_, frequencies_, keys_, values_;
  std::vector<Weight> weights_;
  std::vector<at::Tensor> biases_, vectors_;
};

}  // namespace
