// What a trace must hold for a point to run: checked for all points before the first one runs.
#include <fmt/core.h>

#include <algorithm>
#include <string>
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
    if (first < last) std::fill(needed.begin() + std::max(first, 0), needed.begin() + last, true);
  };
  const bool to_the_end = settings.compress == Compress::always || entry.biases;
  if (entry.observes && traits.observes)
    need(traits.observes_prompt ? 0 : trace.prompt_tokens, to_the_end ? trace.tokens : trace.prompt_tokens);
  const bool even = settings.allocation.kind == Allocation::Kind::uniform;
  for (const BlockRange& block : blocks_of(trace, settings.block)) {
    const bool due = (block.last > settings.budget || !even) &&
                     (block.phase == Phase::prompt || settings.compress == Compress::always);
    if (traits.observation_window > 0 && due) need(block.last - traits.observation_window, block.last);
    if (traits.probe != Probe::none && block.phase == Phase::prompt && block.first > 0) need(block.first, block.last);
    if (traits.future_queries.horizon > 0 && due) need(traits.future_queries.first, block.last);
  }
  return needed;
}

/// What these settings ask of a policy that it cannot do; "" when it can.
std::string impossible(const PolicyEntry& entry, const Traits& traits, const ReplaySettings& settings) {
  if (traits.probe != Probe::none && settings.compress == Compress::always)
    return fmt::format(
        "replay.compress: policy {} compresses before a prompt block is appended, so only 'prompt' (or "
        "auto) is possible",
        entry.doc.name);
  if (traits.future_queries.horizon > 0 && settings.positions != Positions::absolute)
    return fmt::format(
        "replay.positions: policy {} compares keys with queries at positions to come, so only 'absolute' is "
        "possible",
        entry.doc.name);
  if (settings.allocation.kind == Allocation::Kind::adaptive && traits.scope == Scope::layer)
    return fmt::format(
        "allocation.kind: under policy {} all heads of a layer keep the same tokens, so 'adaptive' is "
        "impossible",
        entry.doc.name);
  if (settings.allocation.kind == Allocation::Kind::adaptive && traits.select == Select::links)
    return fmt::format("allocation.kind: policy {} scores links, not slots, so 'adaptive' is impossible",
                       entry.doc.name);
  return "";
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
  if (const std::string why = impossible(entry, traits, settings); !why.empty()) throw ConfigError(why);
  std::vector<bool> needed = needed_queries(trace, entry, traits, settings);
  for (const int token : settings.measured) needed[static_cast<std::size_t>(token)] = true;
  for (const LayerInfo& layer : trace.layers) {
    const bool rotated = layer.rope_post && trace.model.rope_type != "none";
    if (settings.positions != Positions::absolute && rotated)
      fail(layer,
           fmt::format("replay.positions: {} needs unrotated queries and keys, but the trace stores rotated ones "
                       "(attribute rope = 'post')",
                       name_of(settings.positions)));
    if (traits.future_queries.horizon > 0 && rotated)
      fail(layer, "needs unrotated queries, but the trace stores rotated ones (attribute rope = 'post')");
    if (traits.output_norm && !layer.has_wo) fail(layer, "needs wo, which was not recorded (capture --with wo)");
    if (traits.key_gradient == KeyGradient::recorded && !layer.has_e)
      fail(layer, "needs e, which was not recorded (capture --with gradient); 'gradient: surrogate' goes without");
    if (layer.q_index.empty()) continue;
    for (int t = 0; t < trace.tokens; ++t)
      if (needed[static_cast<std::size_t>(t)] && !std::binary_search(layer.q_index.begin(), layer.q_index.end(), t))
        fail(layer, fmt::format("needs the query of token {}, which q_index does not list", t));
  }
}

}  // namespace kv
