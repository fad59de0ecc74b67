// Rotary position embedding as the recorded model applied it (design section 3).
#pragma once
#include <cstddef>
#include <span>
#include <vector>

#include "core/dtype.hpp"
#include "core/trace.hpp"

namespace kv {

/// Rotations for a fixed list of positions.
class RopeTable {
 public:
  /// Cosines and sines of inv_freq * position in float32, times attention_scaling; rounded to `dtype` under the recipe
  /// `model`, where each product and the sum are rounded as well. rope_type "none" rotates nothing.
  RopeTable(const ModelInfo& model, Dtype dtype, RopeRecipe recipe, std::span<const int> positions);

  /// out = the rotation to positions[index] of `in`; both [head_dim]. Channels past the rotary part are copied.
  void rotate(std::size_t index, const float* in, float* out) const;

  /// out = the transposed rotation of `in`, unrounded: what a gradient by a rotated vector is by the unrotated one.
  void rotate_back(std::size_t index, const float* in, float* out) const;

  int pairs() const { return pairs_; }  // of channels that turn
  RopeStyle style() const { return style_; }
  Dtype step_dtype() const { return step_dtype_; }            // what every product and sum is rounded to
  const std::vector<float>& cosines() const { return cos_; }  // [position][pair]
  const std::vector<float>& sines() const { return sin_; }    // [position][pair]

 private:
  template <Dtype dtype>
  void rotate_as(std::size_t index, const float* in, float* out) const;

  int head_dim_, pairs_;
  RopeStyle style_;
  Dtype step_dtype_;              // what every product and sum is rounded to; float32 = not at all
  std::vector<float> cos_, sin_;  // [position][pair]
};

}  // namespace kv
