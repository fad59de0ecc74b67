// Made-up traces of any shape, with what real attention has and policies feed on: attention sinks, neighbours that look
// alike, heavy hitters, and key channels with a large mean. Seeded: equal settings give equal bits on any machine.
#pragma once
#include <cstdint>

#include "core/trace.hpp"

namespace kv {

struct Synthetic {
  int layers = 4, query_heads = 32, kv_heads = 8, head_dim = 128, tokens = 4096, prompt_tokens = 3072;
  Dtype dtype = Dtype::bfloat16;
  bool rope = true;          // theta 10000, stored before rotation
  int sinks = 4;             // first tokens, attended by every query
  double heavy = 0.02;       // share of tokens that every query attends to more than to others
  double correlation = 0.9;  // of a key with its neighbour; queries look for keys like their own token's
  int outliers = 2;          // key channels with a mean of six standard deviations
  std::uint64_t seed = 0;
};

/// The header of such a trace: everything but `file`. Throws ConfigError when the shape is impossible.
TraceHeader synthetic_header(const Synthetic& settings);

/// q, k and v of layer `layer` (index into the header's layers).
LayerTensors synthetic_layer(const Synthetic& settings, int layer);

}  // namespace kv
