// Small random traces for tests: seeded, any shape, written through the project's own writer.
#pragma once
#include <cmath>
#include <filesystem>
#include <functional>
#include <random>
#include <string>

#include "core/trace_writer.hpp"

namespace kv::test {

struct Shape {
  int layers = 2, kv_heads = 2, group = 2, head_dim = 16, value_dim = 16, tokens = 60, prompt_tokens = 40;
  Dtype dtype = Dtype::bfloat16;
  bool rope = true;
  RopeStyle style = RopeStyle::half;
  int window = 0;  // of odd layers
  double softcap = 0;
  bool sink_logit = false, wo = false, e = false;
};

inline TraceHeader header_of(const Shape& s) {
  TraceHeader h;
  h.producer = "tests", h.model_id = "synthetic", h.dataset = "synthetic", h.framework = "none", h.license = "CC0-1.0";
  h.tokens = s.tokens, h.prompt_tokens = s.prompt_tokens, h.dtype = s.dtype;
  h.model = {3 * s.layers,
             s.kv_heads * s.group,
             s.kv_heads,
             s.head_dim,
             s.value_dim,
             24,
             1 / std::sqrt(double(s.head_dim)),
             s.softcap,
             s.rope ? "default" : "none",
             s.style,
             1.0,
             {}};
  if (s.rope)
    for (int i = 0; i < s.head_dim / 2; ++i)
      h.model.inv_freq.push_back(std::pow(100.f, -2.f * float(i) / float(s.head_dim)));
  for (int t = 0; t < s.tokens; ++t)
    h.position.push_back(t), h.token_id.push_back(t), h.segment.push_back(t < s.prompt_tokens ? 1 : 4);
  return h;
}

/// Normal values with a few heavy keys and two sinks, so that policies have something to find.
inline LayerTensors tensors_of(const Shape& s, const LayerInfo& info, std::uint64_t seed) {
  std::mt19937_64 random(seed * 1000 + static_cast<std::uint64_t>(info.index));
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t n) {
    std::vector<float> x(n);
    for (float& v : x) v = normal(random);
    return x;
  };
  const auto hq = std::size_t(s.kv_heads * s.group), hkv = std::size_t(s.kv_heads), t = std::size_t(s.tokens),
             d = std::size_t(s.head_dim);
  LayerTensors x;
  x.q = fill(hq * t * d), x.k = fill(hkv * t * d), x.v = fill(hkv * t * std::size_t(s.value_dim));
  for (std::size_t h = 0; h < hkv; ++h)
    for (std::size_t token = 0; token < t; ++token)
      if (token < 2 || random() % 11 == 0)
        for (std::size_t c = 0; c < d; ++c) x.k[(h * t + token) * d + c] *= 2;
  if (s.sink_logit) x.sink_logit = fill(hq);
  if (s.wo) x.wo = fill(24 * hq * std::size_t(s.value_dim));
  if (s.e) x.e = fill(hq * t * std::size_t(s.value_dim));
  return x;
}

using Edit = std::function<void(int layer, LayerTensors&)>;

/// Writes a trace into the temporary folder and returns its path; `edit` may change a layer before it is written.
inline std::filesystem::path write_trace(const std::string& name, const Shape& s, std::uint64_t seed,
                                         const Edit& edit = {}) {
  const auto path =
      std::filesystem::temp_directory_path() / ("kvreplay-" + name + "-" + std::to_string(getpid()) + ".h5");
  TraceWriter writer(path, header_of(s));
  for (int l = 0; l < s.layers; ++l) {
    LayerInfo info;
    info.index = 3 * l, info.window = l % 2 ? s.window : 0;
    LayerTensors tensors = tensors_of(s, info, seed);
    if (edit) edit(l, tensors);
    writer.write_layer(info, tensors);
  }
  writer.close();
  return path;
}

}  // namespace kv::test
