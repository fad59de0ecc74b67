#include "core/synthetic.hpp"

#include <fmt/core.h>
#include <tbb/parallel_for.h>

#include <cmath>
#include <numbers>

#include "core/error.hpp"
#include "core/random.hpp"

namespace kv {
namespace {

/// Independent draws of one purpose in one head: number `i` is the same whatever is drawn before it.
class Draws {
 public:
  Draws(std::uint64_t seed, int layer, int head, int purpose)
      : seed_(mix(seed, static_cast<std::uint64_t>(purpose))), layer_(layer), head_(head) {}
  float uniform(std::size_t i) const {
    const std::uint64_t hash =
        mix(mix(mix(seed_, static_cast<std::uint64_t>(layer_)), static_cast<std::uint64_t>(head_)), i);
    return static_cast<float>(hash >> 40) * 0x1p-24f;
  }
  /// Standard normal (Box and Muller).
  float normal(std::size_t i) const {
    const double radius = std::sqrt(-2 * std::log(1 - static_cast<double>(uniform(2 * i))));
    return static_cast<float>(radius * std::cos(2 * std::numbers::pi * static_cast<double>(uniform(2 * i + 1))));
  }

 private:
  std::uint64_t seed_;
  int layer_, head_;
};

enum Purpose { token_features, directions, heavy_tokens, query_noise, value_noise };

/// A unit vector in the slowest quarter of the rotation's channels, where distance hardly turns it.
std::vector<float> direction(const Draws& draws, int dim, std::size_t which) {
  std::vector<float> x(static_cast<std::size_t>(dim));
  const int half = dim / 2, slow = std::max(1, half / 4);
  double norm = 0;
  for (int c = 0; c < dim; ++c) {
    if (dim > 1 && c % half < half - slow) continue;
    const float v = draws.normal(which * static_cast<std::size_t>(dim) + static_cast<std::size_t>(c));
    x[static_cast<std::size_t>(c)] = v, norm += static_cast<double>(v) * v;
  }
  for (float& v : x) v /= static_cast<float>(std::sqrt(norm));
  return x;
}

/// Fills one KV head and its group of query heads.
void fill_head(const Synthetic& s, int layer, int head, LayerTensors& out) {
  const auto n = static_cast<std::size_t>(s.tokens), d = static_cast<std::size_t>(s.head_dim);
  const auto group = static_cast<std::size_t>(s.query_heads / s.kv_heads), h = static_cast<std::size_t>(head);
  const Draws features(s.seed, layer, head, token_features), axes(s.seed, layer, head, directions),
      heavy(s.seed, layer, head, heavy_tokens), noise(s.seed, layer, head, query_noise),
      values(s.seed, layer, head, value_noise);
  const std::vector<float> to_sink = direction(axes, s.head_dim, 0), to_heavy = direction(axes, s.head_dim, 1);
  const float root = std::sqrt(static_cast<float>(d)), rho = static_cast<float>(s.correlation);
  std::vector<float> feature(d);
  for (std::size_t t = 0; t < n; ++t) {
    const bool is_sink = t < static_cast<std::size_t>(s.sinks),
               is_heavy = heavy.uniform(t) < static_cast<float>(s.heavy);
    float* key = out.k.data() + (h * n + t) * d;
    float* value = out.v.data() + (h * n + t) * d;
    for (std::size_t c = 0; c < d; ++c) {
      const float fresh = features.normal(t * d + c);
      feature[c] = t == 0 ? fresh : rho * feature[c] + std::sqrt(1 - rho * rho) * fresh;
      const float mean = c < static_cast<std::size_t>(s.outliers) ? 6.f : 0.f;
      // Logits: 6 for a sink, 4 for a heavy hitter, 0.4 sqrt(d) for a key like the query's own token.
      key[c] = feature[c] + mean + (is_sink ? 3 * root * to_sink[c] : 0) + (is_heavy ? 2 * root * to_heavy[c] : 0);
      value[c] = values.normal(t * d + c) * (is_sink ? 0.1f : 1.f);  // sinks carry little
      for (std::size_t g = 0; g < group; ++g)
        out.q[((h * group + g) * n + t) * d + c] =
            0.4f * feature[c] + 0.3f * noise.normal((g * n + t) * d + c) + 2 * to_sink[c] + 2 * to_heavy[c];
    }
  }
}

}  // namespace

TraceHeader synthetic_header(const Synthetic& s) {
  if (s.kv_heads < 1 || s.query_heads % s.kv_heads != 0)
    throw ConfigError(fmt::format("--query-heads: {} is no multiple of the {} KV heads", s.query_heads, s.kv_heads));
  if (s.rope && s.head_dim % 2 != 0) throw ConfigError("--head-dim: rotation needs an even number; use --no-rope");
  if (s.prompt_tokens > s.tokens)
    throw ConfigError(fmt::format("--prompt: {} tokens are more than all {}", s.prompt_tokens, s.tokens));
  TraceHeader h;
  h.producer = "kvreplay synth", h.framework = "none", h.license = "CC0-1.0", h.dataset = "synthetic";
  h.model_id = fmt::format("synthetic, seed {}", s.seed);
  h.tokens = s.tokens, h.prompt_tokens = s.prompt_tokens, h.dtype = s.dtype;
  ModelInfo& m = h.model;
  m.layers = s.layers, m.query_heads = s.query_heads, m.kv_heads = s.kv_heads;
  m.head_dim = m.value_dim = s.head_dim, m.hidden_size = s.query_heads * s.head_dim;
  m.scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  m.rope_type = s.rope ? "default" : "none";
  for (int i = 0; s.rope && i < s.head_dim / 2; ++i)
    m.inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / s.head_dim)));
  for (int t = 0; t < s.tokens; ++t) h.position.push_back(t), h.token_id.push_back(t);
  for (int l = 0; l < s.layers; ++l) {
    LayerInfo info;
    info.index = l;
    h.layers.push_back(info);
  }
  return h;
}

LayerTensors synthetic_layer(const Synthetic& s, int layer) {
  LayerTensors out;
  const auto rows = static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.head_dim);
  out.q.resize(static_cast<std::size_t>(s.query_heads) * rows);
  out.k.resize(static_cast<std::size_t>(s.kv_heads) * rows), out.v.resize(out.k.size());
  tbb::parallel_for(0, s.kv_heads, [&](int head) { fill_head(s, layer, head, out); });
  return out;
}

}  // namespace kv
