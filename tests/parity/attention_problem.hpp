// Made-up attention tasks, here and on the device, and what the block kernels must make of them, in float64.
#pragma once
#include <Eigen/Core>
#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "core/rounding.hpp"
#include "kernels/block_attention.hpp"
#include "kernels/buffer.hpp"

namespace kv {

/// What a problem is like. `hides`: a newest_key; `gathers`: gaps between tokens, queries anywhere; `e`: own gradients.
struct ProblemShape {
  Dtype elements = Dtype::bfloat16;
  int key_dim = 128, value_dim = 128, group = 4, rows = 64, slots = 200, older = 0;
  float softcap = 0, bias_size = 1;
  int window = 0;
  bool sinks = false, bias = false, hides = false, gathers = false, e = false;
};

using Doubles = std::vector<double>;
inline std::size_t index(long i) { return static_cast<std::size_t>(i); }

/// Values that `type` can store, as floats and as bytes.
struct Stored {
  std::vector<float> values;
  std::vector<std::byte> bytes;

  Stored(Dtype type, std::size_t count, float spread, std::mt19937& random)
      : values(count), bytes(count * size_of(type)) {
    std::normal_distribution<float> normal(0, spread);
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = round_to(type, normal(random));
      if (type == Dtype::float32) {
        std::memcpy(bytes.data() + 4 * i, &values[i], 4);
      } else if (type == Dtype::bfloat16) {
        const auto bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(values[i]) >> 16);
        std::memcpy(bytes.data() + 2 * i, &bits, 2);
      } else {
        const Eigen::half half(values[i]);
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      }
    }
  }
};

/// What the kernels compute, as the contract states it, in float64.
struct Expected {
  Doubles output, lse, sums, lost, gradients;
};

/// One task: made-up inputs here and on the device.
class Problem {
 public:
  Problem(const ProblemShape& shape, unsigned seed)
      : shape_(shape),
        random_(seed),
        queries_(shape.elements, index(long{shape.group} * stride() * shape.key_dim), 1.7f, random_),
        keys_(shape.elements, index(long{shape.slots} * shape.key_dim), 1, random_),
        values_(shape.elements, index(long{shape.slots} * shape.value_dim), 1, random_) {
    make_tokens();
    std::normal_distribution<float> normal;
    bias_.resize(index(shape.slots)), sinks_.resize(index(shape.group));
    for (auto* values : {&bias_, &sinks_})
      std::generate(values->begin(), values->end(), [&] { return normal(random_); });
    for (float& bias : bias_) bias *= shape.bias_size;
    e_.resize(index(long{shape.group} * stride() * shape.value_dim));
    std::generate(e_.begin(), e_.end(), [&] { return normal(random_); });
    upload();
  }

  AttentionTask task() const { return task_; }
  LostMassTask lost_task() const { return {task_, lost_at_device_.data(), lost_.data()}; }
  KeyGradientTask gradient_task() const {
    return {task_, shape_.e ? e_device_.data() : nullptr, gradients_.data(), stride()};
  }
  void lse_only() { task_.output = nullptr; }

  /// Fills all results with bytes that are no number.
  void spoil() {
    const auto fill = [](auto& buffer) {
      KV_CUDA_TRY(cudaMemset(buffer.data(), 0xff, buffer.size() * sizeof(*buffer.data())));
    };
    fill(output_), fill(lse_), fill(sums_), fill(lost_), fill(gradients_);
  }
  std::vector<float> output() const { return output_.to_host(); }
  std::vector<float> lse() const { return lse_.to_host(); }
  std::vector<float> sums() const { return sums_.to_host(); }
  std::vector<double> lost() const { return lost_.to_host(); }
  std::vector<float> gradients() const { return gradients_.to_host(); }

  const ProblemShape& shape() const { return shape_; }
  Expected expected() const;

 private:
  long stride() const { return shape_.rows + 3; }
  void make_tokens();
  void upload();
  bool sees(int row, int slot) const {
    const int query = query_token_[index(row)], key = token_[index(slot)];
    return key <= query && key <= newest_key_ && (shape_.window == 0 || query - key < shape_.window);
  }

  ProblemShape shape_;
  std::mt19937 random_;
  Stored queries_, keys_, values_;
  std::vector<int> token_, query_row_, query_token_, lost_at_;
  std::vector<float> bias_, sinks_, e_;
  int newest_key_ = INT_MAX;
  AttentionTask task_;
  Buffer<std::byte> queries_device_, keys_device_, values_device_;
  Buffer<int> token_device_, query_row_device_, query_token_device_, lost_at_device_;
  Buffer<float> bias_device_, sinks_device_, e_device_, output_, lse_, sums_, gradients_;
  Buffer<double> lost_;
};

/// Older slots in any order, then later ones in order; rows among the later tokens. With `gathers` both have gaps and the
/// queries lie anywhere.
inline void Problem::make_tokens() {
  const int step = shape_.gathers ? 3 : 1, newer = shape_.slots - shape_.older;
  const auto jump = [&] { return step == 1 ? 1 : 1 + static_cast<int>(random_() % 3); };
  for (int i = 0, token = 0; i < shape_.older; ++i) token_.push_back(token), token += jump();
  int token = shape_.older * step;
  std::shuffle(token_.begin(), token_.end(), random_);
  for (int i = 0; i < newer; ++i) token_.push_back(token), token += jump();
  int query = std::max(shape_.older * step, token - shape_.rows * step);
  query_row_.resize(index(shape_.rows));
  std::iota(query_row_.begin(), query_row_.end(), 2);
  if (shape_.gathers) std::shuffle(query_row_.begin(), query_row_.end(), random_);
  for (int r = 0; r < shape_.rows; ++r) query_token_.push_back(query), query += jump();
  if (shape_.hides && shape_.slots > 0) newest_key_ = token_.back() - shape_.rows * step / 2;
  for (int s = 0; s < shape_.slots; ++s)
    lost_at_.push_back(random_() % 2 ? INT_MAX : static_cast<int>(random_() % index(token + 1)));
}

inline void Problem::upload() {
  const auto put = [](auto& to, const auto& host) { to = std::decay_t<decltype(to)>(host); };
  put(queries_device_, queries_.bytes), put(keys_device_, keys_.bytes), put(values_device_, values_.bytes);
  put(token_device_, token_), put(query_row_device_, query_row_), put(query_token_device_, query_token_);
  put(lost_at_device_, lost_at_), put(bias_device_, bias_), put(sinks_device_, sinks_), put(e_device_, e_);
  const auto pairs = index(long{shape_.rows} * shape_.group), slots = index(shape_.slots);
  put(output_, pairs * index(shape_.value_dim)), put(lse_, pairs), put(lost_, pairs);
  put(sums_, slots * index(shape_.group)), put(gradients_, slots * index(shape_.key_dim));
  task_.keys = keys_device_.data(), task_.values = values_device_.data(), task_.queries = queries_device_.data();
  task_.token = token_device_.data(), task_.query_row = query_row_device_.data();
  task_.query_token = query_token_device_.data(), task_.query_stride = stride();
  if (shape_.bias) task_.bias = bias_device_.data();
  if (shape_.sinks) task_.sink_logit = sinks_device_.data();
  task_.output = output_.data(), task_.lse = lse_.data(), task_.sums = sums_.data();
  task_.slots = shape_.slots, task_.older = shape_.older, task_.rows = shape_.rows, task_.window = shape_.window;
  task_.newest_key = newest_key_;
}

inline double scale_of(const ProblemShape& shape) { return static_cast<float>(1 / std::sqrt(shape.key_dim)); }

inline Expected Problem::expected() const {
  const int group = shape_.group, dk = shape_.key_dim, dv = shape_.value_dim, slots = shape_.slots;
  const double scale = scale_of(shape_), cap = shape_.softcap;
  Expected all;
  all.output.assign(index(long{shape_.rows} * group * dv), 0),
      all.lse.assign(index(long{shape_.rows} * group), -INFINITY);
  all.sums.assign(index(long{slots} * group), 0), all.lost.assign(all.lse.size(), 0);
  all.gradients.assign(index(long{slots} * dk), 0);
  Doubles p(index(slots)), slope(index(slots));
  for (int r = 0; r < shape_.rows; ++r)
    for (int g = 0; g < group; ++g) {
      const long pair = long{r} * group + g, query = (g * stride() + query_row_[index(r)]);
      const float* const q = queries_.values.data() + query * dk;
      double denominator = shape_.sinks ? std::exp(double{sinks_[index(g)]}) : 0;
      for (int s = 0; s < slots; ++s) {
        const float* const k = keys_.values.data() + long{s} * dk;
        double logit = 0;
        for (int d = 0; d < dk; ++d) logit += double{q[d]} * k[d];
        logit *= scale, slope[index(s)] = 1;
        if (cap > 0) {
          const double bent = std::tanh(logit / cap);
          logit = cap * bent, slope[index(s)] = 1 - bent * bent;
        }
        if (shape_.bias) logit += bias_[index(s)];
        denominator += p[index(s)] = sees(r, s) ? std::exp(logit) : 0;
      }
      if (denominator == 0) continue;
      all.lse[index(pair)] = std::log(denominator);
      double* const o = all.output.data() + pair * dv;
      for (int s = 0; s < slots; ++s) {
        p[index(s)] /= denominator;
        for (int d = 0; d < dv; ++d) o[d] += p[index(s)] * values_.values[index(long{s} * dv + d)];
        all.sums[index(long{s} * group + g)] += p[index(s)];
        if (lost_at_[index(s)] < query_token_[index(r)]) all.lost[index(pair)] += p[index(s)];
      }
      double e_dot_o = 0;
      const auto e = [&](int d) { return shape_.e ? double{e_[index(query * dv + d)]} : o[d]; };
      for (int d = 0; d < dv; ++d) e_dot_o += e(d) * o[d];
      for (int s = 0; s < slots; ++s) {
        if (p[index(s)] == 0) continue;
        double e_dot_v = 0;
        for (int d = 0; d < dv; ++d) e_dot_v += e(d) * values_.values[index(long{s} * dv + d)];
        const double by_logit = scale * p[index(s)] * (e_dot_v - e_dot_o) * slope[index(s)];
        for (int d = 0; d < dk; ++d) all.gradients[index(long{s} * dk + d)] += by_logit * q[d];
      }
    }
  return all;
}

}  // namespace kv
