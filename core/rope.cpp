#include "core/rope.hpp"

#include <algorithm>
#include <cmath>

#include "core/rounding.hpp"

namespace kv {

RopeTable::RopeTable(const ModelInfo& model, Dtype dtype, RopeRecipe recipe, std::span<const int> positions)
    : head_dim_(model.head_dim),
      pairs_(model.rope_type == "none" ? 0 : static_cast<int>(model.inv_freq.size())),
      style_(model.rope_style),
      step_dtype_(recipe == RopeRecipe::model ? dtype : Dtype::float32) {
  cos_.reserve(positions.size() * static_cast<std::size_t>(pairs_));
  sin_.reserve(cos_.capacity());
  const float scaling = static_cast<float>(model.attention_scaling);
  for (const int position : positions)
    for (int i = 0; i < pairs_; ++i) {
      const float angle = model.inv_freq[static_cast<std::size_t>(i)] * static_cast<float>(position);
      cos_.push_back(round_to(step_dtype_, std::cos(angle) * scaling));
      sin_.push_back(round_to(step_dtype_, std::sin(angle) * scaling));
    }
}

template <Dtype dtype>
void RopeTable::rotate_as(std::size_t index, const float* in, float* out) const {
  const float* cos = cos_.data() + index * static_cast<std::size_t>(pairs_);
  const float* sin = sin_.data() + index * static_cast<std::size_t>(pairs_);
  const int second = style_ == RopeStyle::half ? pairs_ : 1, stride = style_ == RopeStyle::half ? 1 : 2;
  for (int i = 0; i < pairs_; ++i) {
    const float x = in[i * stride], y = in[i * stride + second];
    out[i * stride] = rounded<dtype>(rounded<dtype>(x * cos[i]) + rounded<dtype>(-y * sin[i]));
    out[i * stride + second] = rounded<dtype>(rounded<dtype>(y * cos[i]) + rounded<dtype>(x * sin[i]));
  }
  std::copy(in + 2 * pairs_, in + head_dim_, out + 2 * pairs_);
}

void RopeTable::rotate_back(std::size_t index, const float* in, float* out) const {
  const float* cos = cos_.data() + index * static_cast<std::size_t>(pairs_);
  const float* sin = sin_.data() + index * static_cast<std::size_t>(pairs_);
  const int second = style_ == RopeStyle::half ? pairs_ : 1, stride = style_ == RopeStyle::half ? 1 : 2;
  for (int i = 0; i < pairs_; ++i) {
    const float x = in[i * stride], y = in[i * stride + second];
    out[i * stride] = x * cos[i] + y * sin[i];
    out[i * stride + second] = y * cos[i] - x * sin[i];
  }
  std::copy(in + 2 * pairs_, in + head_dim_, out + 2 * pairs_);
}

void RopeTable::rotate(std::size_t index, const float* in, float* out) const {
  switch (step_dtype_) {
    case Dtype::float16:
      return rotate_as<Dtype::float16>(index, in, out);
    case Dtype::bfloat16:
      return rotate_as<Dtype::bfloat16>(index, in, out);
    case Dtype::float32:
      return rotate_as<Dtype::float32>(index, in, out);
  }
}

}  // namespace kv
