// What a trace must hold for a point to run: checked for all points before the first one runs.
#include <fmt/core.h>

#include <algorithm>
#include <vector>

#include "core/error.hpp"
#include "core/head_replay.hpp"

namespace kv {
namespace {

/// Marks the tokens whose queries a replay reads.
std::vector<bool> needed_queries(const TraceHeader& trace, const PolicyEntry& entry, const Traits& traits,
                                 const ReplaySettings& settings) {
  std::vector<bool> needed(static_cast<std::size_t>(trace.tokens), false);
  const auto need = [&](int first, int last) {
    std::fill(needed.begin() + std::max(first, 0), needed.begin() + last, true);
  };
  if (entry.observes) need(traits.observes_prompt ? 0 : trace.prompt_tokens, trace.tokens);
  if (traits.observation_window > 0)
    for (const BlockRange& block : blocks_of(trace, settings.block))
      if (block.last > settings.budget && (block.phase == Phase::prompt || settings.compress == Compress::always))
        need(block.last - traits.observation_window, block.last);
  return needed;
}

}  // namespace

std::vector<int> recorded_queries(const TraceHeader& trace, const std::vector<int>& tokens) {
  std::vector<int> recorded = tokens;
  for (const LayerInfo& layer : trace.layers)
    if (!layer.q_index.empty())
      std::erase_if(recorded,
                    [&](int t) { return !std::binary_search(layer.q_index.begin(), layer.q_index.end(), t); });
  return recorded;
}

void check_point(const TraceHeader& trace, const PolicyEntry& entry, const BoundPolicy& policy,
                 const ReplaySettings& settings) {
  const Traits traits = policy.traits();
  const auto fail = [&](const LayerInfo& layer, const std::string& why) {
    throw ConfigError(
        fmt::format("policy {}: {} (trace {}, {})", entry.doc.name, why, trace.file.string(), layer.path));
  };
  KV_CHECK(settings.budget >= 1 && !settings.measured.empty());
  std::vector<bool> needed = needed_queries(trace, entry, traits, settings);
  for (const int token : settings.measured) needed[static_cast<std::size_t>(token)] = true;
  for (const LayerInfo& layer : trace.layers) {
    if (settings.positions == Positions::cache && layer.rope_post && trace.model.rope_type != "none")
      fail(layer,
           "replay.positions: cache needs unrotated queries and keys, but the trace stores rotated ones (attribute "
           "rope = 'post')");
    if (layer.q_index.empty()) continue;
    for (int t = 0; t < trace.tokens; ++t)
      if (needed[static_cast<std::size_t>(t)] && !std::binary_search(layer.q_index.begin(), layer.q_index.end(), t))
        fail(layer, fmt::format("needs the query of token {}, which q_index does not list", t));
  }
}

}  // namespace kv
