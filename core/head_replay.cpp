#include "core/head_replay.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "core/query_rows.hpp"

namespace kv {

namespace {

/// The most slots a head is likely to hold: everything, or a budget and one block on top of it.
int slot_limit(const LayerReplay& layer, const Traits& traits) {
  const TraceHeader& t = layer.trace;
  if (!traits.needs_budget() || layer.settings.allocation.kind == Allocation::Kind::adaptive) return t.tokens;
  const int block = layer.settings.block.tokens > 0 ? layer.settings.block.tokens : t.prompt_tokens;
  const int growth = layer.settings.compress == Compress::prompt ? t.tokens - t.prompt_tokens : traits.interval;
  const int before =
      traits.probe == Probe::none ? 0 : block;  // a probed block joins a cache that is not compressed yet
  return static_cast<int>(
      std::min<std::int64_t>(t.tokens, std::int64_t{layer.budget} + before + std::max(block, 1) + growth));
}

HeadInfo info_of(const LayerReplay& layer, int kv_head) {
  const ModelInfo& m = layer.trace.model;
  HeadInfo info;
  info.layer = layer.layer.info.index, info.window = layer.layer.info.window, info.kv_head = kv_head;
  info.group = m.group(), info.key_dim = m.head_dim, info.value_dim = m.value_dim;
  info.budget = layer.budget, info.prompt_tokens = layer.trace.prompt_tokens;
  info.scale = static_cast<float>(m.scale), info.seed = layer.settings.seed;
  return info;
}

std::vector<int> steps_of(const LayerReplay& layer) {
  std::vector<int> steps;
  for (const BlockRange& block : blocks_of(layer.trace, layer.settings.block)) steps.push_back(block.last - 1);
  return steps;
}

}  // namespace

HeadReplay::HeadReplay(const LayerReplay& layer, int kv_head)
    : layer_(layer),
      model_(layer.trace.model),
      kv_head_(kv_head),
      group_(layer.trace.model.group()),
      budget_(layer.budget),
      traits_(layer.policy.traits()),
      cache_(model_.head_dim, model_.value_dim, layer.trace.tokens, slot_limit(layer, traits_)),
      program_(layer.policy.bind(info_of(layer, kv_head))) {
  if (traits_.future_queries.horizon > 0) statistics_.emplace(model_, group_);
  if (traits_.future_mass) future_.emplace(layer.trace, layer.layer, kv_head, steps_of(layer));
}

void HeadReplay::append_rows(const BlockRange& block) {
  const auto head = static_cast<std::size_t>(kv_head_) * static_cast<std::size_t>(layer_.trace.tokens);
  const auto& keys = layer_.settings.positions == Positions::absolute ? layer_.layer.k_rotated : layer_.layer.tensors.k;
  for (int t = block.first; t < block.last; ++t) {
    const std::size_t row = head + static_cast<std::size_t>(t);
    cache_.append(t, keys.data() + row * static_cast<std::size_t>(model_.head_dim),
                  layer_.layer.tensors.v.data() + row * static_cast<std::size_t>(model_.value_dim));
  }
}

void HeadReplay::take(const BlockRange& block, int step) {
  const int older = cache_.size();
  enter(block), now_ = block.last - 1;
  timed(TimedPhase::append, [&] {
    append_rows(block);
    program_->append(cache_, moment(), older);
  });
  if (layer_.full) {
    const std::size_t steps = layer_.result->step_token.size();
    layer_.result->slots[static_cast<std::size_t>(layer_.index * model_.kv_heads + kv_head_) * steps +
                         static_cast<std::size_t>(step)] = cache_.size();
  }
  if (watches(block.phase)) add_statistics(block);
  const auto& all = layer_.settings.measured;
  const std::vector<int> measured(std::lower_bound(all.begin(), all.end(), block.first),
                                  std::lower_bound(all.begin(), all.end(), block.last));
  const bool observe = layer_.entry.observes && traits_.observes && watches(block.phase);
  Look look{.tokens = measured, .output = !measured.empty(), .observe = observe};
  look.mass = layer_.full && layer_.settings.mass && !measured.empty();
  if (observe) {
    look.tokens.resize(static_cast<std::size_t>(block.last - block.first));
    std::iota(look.tokens.begin(), look.tokens.end(), block.first);
  }
  if (look.tokens.empty()) return;
  if (static_cast<int>(look.tokens.size()) == block.last - block.first) look.older = older;
  const Attended attended = attend(look);
  if (layer_.full && !measured.empty()) measure(look.tokens, measured, attended);
  if (observe)
    timed(TimedPhase::observe, [&] {
      Sight sight;
      sight.seen = gather(static_cast<int>(look.tokens.size()));
      program_->observe(cache_, moment(), sight);
    });
}

bool HeadReplay::watches(Phase phase) const {
  if (phase == Phase::prompt) return traits_.observes_prompt;
  return layer_.settings.compress == Compress::always || layer_.entry.biases;
}

void HeadReplay::add_statistics(const BlockRange& block) {
  timed(TimedPhase::observe, [&] {
    if (statistics_)
      for (int t = std::max(block.first, traits_.future_queries.first); t < block.last; ++t) {
        if (layer_.layer.row_of_token[static_cast<std::size_t>(t)] < 0) continue;  // no compression will need it
        const std::vector<float> q = gather_queries(model_, layer_.layer, layer_.layer.tensors.q, kv_head_, {&t, 1});
        statistics_->add([&](int g) { return q.data() + g * model_.head_dim; });
      }
    if (future_) future_->advance(now_);
  });
}

std::vector<int> HeadReplay::places() const {
  if (layer_.settings.positions == Positions::cache) return {cache_.rank().begin(), cache_.rank().end()};
  std::vector<int> place(static_cast<std::size_t>(cache_.size()));
  int tokens = 0;  // that the slots of earlier blocks count as, so far
  for (const int slot : cache_.order()) {
    const auto s = static_cast<std::size_t>(slot);
    const int token = cache_.tokens()[s];
    // A merged slot sits where the last token of its span was; the present block goes on where the cache ended.
    if (token < block_first_) tokens += cache_.multiplicities()[s];
    place[s] = token < block_first_ ? tokens - cache_.multiplicities()[static_cast<std::size_t>(cache_.order()[0])]
                                    : tokens + token - block_first_;
  }
  return place;
}

std::vector<float> HeadReplay::queries(const std::vector<int>& tokens) const {
  if (layer_.settings.positions == Positions::absolute)
    return gather_queries(model_, layer_.layer, layer_.layer.q_rotated, kv_head_, tokens);
  std::vector<float> rows = gather_queries(model_, layer_.layer, layer_.layer.tensors.q, kv_head_, tokens);
  const auto dim = static_cast<std::size_t>(model_.head_dim), group = static_cast<std::size_t>(group_);
  const std::vector<int> place = places();
  std::vector<float> unrotated(dim);
  for (std::size_t i = 0; i < tokens.size() * group; ++i) {  // a query sits at the newest slot that is not after it
    std::copy_n(rows.data() + i * dim, dim, unrotated.data());
    const int newest = std::max(0, cache_.count_up_to(tokens[i / group]) - 1);
    const int slot = cache_.order()[static_cast<std::size_t>(newest)];
    layer_.layer.by_slot->rotate(static_cast<std::size_t>(place[static_cast<std::size_t>(slot)]), unrotated.data(),
                                 rows.data() + i * dim);
  }
  return rows;
}

AttentionKeys HeadReplay::attention_keys() {
  AttentionKeys keys{cache_.keys(), cache_.values(), cache_.tokens().data(),
                     cache_.size(), model_.head_dim, model_.value_dim};
  if (layer_.entry.biases) {
    bias_.resize(static_cast<std::size_t>(cache_.size()));
    program_->log_bias(cache_, moment(), bias_);
    keys.bias = bias_.data();
  }
  if (layer_.settings.positions == Positions::absolute) return keys;
  const auto dim = static_cast<std::size_t>(model_.head_dim);
  const std::vector<int> place = places();
  slot_rotated_.resize(place.size() * dim);
  slot_rotated_at_.resize(place.size(), -1);
  for (std::size_t s = 0; s < place.size(); ++s) {
    if (slot_rotated_at_[s] == place[s]) continue;
    slot_rotated_at_[s] = place[s];
    layer_.layer.by_slot->rotate(static_cast<std::size_t>(place[s]), cache_.keys() + s * dim,
                                 slot_rotated_.data() + s * dim);
  }
  keys.keys = slot_rotated_.data();
  return keys;
}

HeadReplay::Attended HeadReplay::attend(const Look& look) {
  Attended out;
  const int count = static_cast<int>(look.tokens.size());
  const auto rows = static_cast<std::size_t>(count * group_), slots = static_cast<std::size_t>(cache_.size());
  double observing = 0;  // counted as observe, not as attend
  double measuring = 0;  // not counted
  std::vector<float> q;
  if (look.observe) sums_.assign(slots * static_cast<std::size_t>(group_), 0.0);
  if (look.gradient) gradient_.assign(slots * static_cast<std::size_t>(model_.head_dim), 0.f);
  const auto visit = [&](const AttentionTile& tile) {
    const auto start = std::chrono::steady_clock::now();
    for (int r = 0; look.observe && r < tile.rows * group_; ++r) {
      const auto offset = static_cast<std::size_t>(r) * tile.stride;
      program_->weigh(tile.probability + offset, tile.logit + offset, tile.columns,
                      count - 1 - (tile.first_row + r / group_), look.window,
                      sums_.data() + static_cast<std::size_t>(r % group_) * slots);
    }
    if (look.gradient) add_gradient(tile, look, q);
    const auto observed = std::chrono::steady_clock::now();
    if (look.mass) measure_mass(tile, look.tokens);
    observing += std::chrono::duration<double, std::nano>(observed - start).count();
    measuring += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - observed).count();
  };
  timed(look.phase, [&] {
    q = queries(look.tokens);
    if (look.output) out.output.resize(rows * static_cast<std::size_t>(model_.value_dim)), out.lse.resize(rows);
    const bool in_order = look.older >= 0;
    attention_.run(attention_keys(), rule_of(model_, layer_.layer, kv_head_),
                   {q.data(), look.tokens.data(), count, group_, look.newest_key}, in_order ? look.older : 0,
                   in_order ? look.older + 1 : cache_.size(), look.output ? out.output.data() : nullptr,
                   look.output ? out.lse.data() : nullptr,
                   look.observe || look.gradient || look.mass ? std::function(visit) : nullptr);
  });
  times_[static_cast<std::size_t>(look.phase)] -= observing + measuring;
  times_[static_cast<std::size_t>(TimedPhase::observe)] += observing;
  return out;
}

Observation HeadReplay::gather(int rows) {
  const auto slots = static_cast<std::size_t>(cache_.size()), group = static_cast<std::size_t>(group_);
  observed_.resize(slots * group);
  for (std::size_t g = 0; g < group; ++g)
    for (std::size_t s = 0; s < slots; ++s) observed_[s * group + g] = static_cast<float>(sums_[g * slots + s]);
  return {observed_.data(), rows, group_};
}

bool HeadReplay::due(const BlockRange& block) const {
  if (!traits_.compresses) return false;
  if (block.phase == Phase::prompt) return traits_.needs_budget() ? over_budget() : cache_.size() > 1;
  return layer_.settings.compress == Compress::always && over_budget() &&
         (block.first - layer_.trace.prompt_tokens + 1) % traits_.interval == 0;
}

std::size_t HeadReplay::workspace_bytes() const {
  std::size_t bytes = attention_.workspace_bytes() + sizeof(double) * sums_.capacity() + fold_bytes_;
  for (const auto* v : {&observed_, &bias_, &gradient_, &slot_rotated_, &similarity_, &future_of_slot_})
    bytes += sizeof(float) * v->capacity();
  for (const auto* v : {&slot_rotated_at_, &target_}) bytes += sizeof(int) * v->capacity();
  return bytes + stays_.capacity();
}

}  // namespace kv
