// From a prepared layer's tensors to what the attention of one KV head takes.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "core/attention.hpp"
#include "core/session.hpp"

namespace kv {

/// The queries of `tokens` (all recorded) for the group of KV head `head`: [tokens][group][head_dim], out of
/// layer.q_rotated or layer.tensors.q.
inline std::vector<float> gather_queries(const ModelInfo& model, const PreparedLayer& layer,
                                         const std::vector<float>& q, int head, std::span<const int> tokens) {
  const auto group = static_cast<std::size_t>(model.group()), dim = static_cast<std::size_t>(model.head_dim);
  const std::size_t rows = q.size() / (static_cast<std::size_t>(model.query_heads) * dim);
  std::vector<float> queries(tokens.size() * group * dim);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    for (std::size_t g = 0; g < group; ++g) {
      const auto row = static_cast<std::size_t>(layer.row_of_token[static_cast<std::size_t>(tokens[i])]);
      std::copy_n(q.data() + ((static_cast<std::size_t>(head) * group + g) * rows + row) * dim, dim,
                  queries.data() + (i * group + g) * dim);
    }
  return queries;
}

inline AttentionRule rule_of(const ModelInfo& model, const PreparedLayer& layer, int head) {
  const std::vector<float>& sinks = layer.tensors.sink_logit;
  return {static_cast<float>(model.scale), static_cast<float>(model.softcap), layer.info.window,
          sinks.empty() ? nullptr : sinks.data() + head * model.group()};
}

/// All tokens of one KV head at their own positions; `token` is 0, 1, 2, ...
inline AttentionKeys keys_of(const TraceHeader& header, const PreparedLayer& layer, int head,
                             const std::vector<int>& token) {
  const ModelInfo& m = header.model;
  const auto first = static_cast<std::size_t>(head) * static_cast<std::size_t>(header.tokens);
  return {layer.k_rotated.data() + first * static_cast<std::size_t>(m.head_dim),
          layer.tensors.v.data() + first * static_cast<std::size_t>(m.value_dim),
          token.data(),
          header.tokens,
          m.head_dim,
          m.value_dim};
}

}  // namespace kv
