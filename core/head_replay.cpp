#include "core/head_replay.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.hpp"
#include "core/fold.hpp"
#include "core/query_rows.hpp"

namespace kv {

std::vector<BlockRange> blocks_of(const TraceHeader& trace, Block block) {
  std::vector<BlockRange> blocks;
  const int size = block.tokens > 0 ? block.tokens : std::max(1, trace.prompt_tokens);
  for (int t = 0; t < trace.prompt_tokens; t += size)
    blocks.push_back({t, std::min(t + size, trace.prompt_tokens), Phase::prompt});
  for (int t = trace.prompt_tokens; t < trace.tokens; ++t) blocks.push_back({t, t + 1, Phase::decode});
  return blocks;
}

namespace {

/// The most slots a head can hold: everything, or a budget and one block on top of it.
int slot_limit(const LayerReplay& layer, const Traits& traits) {
  const TraceHeader& t = layer.trace;
  if (!traits.compresses) return t.tokens;
  const int block = layer.settings.block.tokens > 0 ? layer.settings.block.tokens : t.prompt_tokens;
  const int growth = layer.settings.compress == Compress::prompt ? t.tokens - t.prompt_tokens : 1;
  return static_cast<int>(
      std::min<std::int64_t>(t.tokens, std::int64_t{layer.settings.budget} + std::max(block, 1) + growth));
}

HeadInfo info_of(const LayerReplay& layer, int kv_head) {
  const ModelInfo& m = layer.trace.model;
  return {layer.layer.info.index,
          kv_head,
          m.group(),
          m.head_dim,
          m.value_dim,
          layer.settings.budget,
          layer.trace.prompt_tokens,
          layer.settings.seed};
}

}  // namespace

HeadReplay::HeadReplay(const LayerReplay& layer, int kv_head)
    : layer_(layer),
      model_(layer.trace.model),
      kv_head_(kv_head),
      group_(layer.trace.model.group()),
      traits_(layer.policy.traits()),
      cache_(model_.head_dim, model_.value_dim, layer.trace.tokens, slot_limit(layer, traits_)),
      program_(layer.policy.bind(info_of(layer, kv_head))) {}

void HeadReplay::take(const BlockRange& block, int step) {
  const int older = cache_.size();
  timed(TimedPhase::append, [&] {
    const auto head = static_cast<std::size_t>(kv_head_) * static_cast<std::size_t>(layer_.trace.tokens);
    const auto& keys =
        layer_.settings.positions == Positions::absolute ? layer_.layer.k_rotated : layer_.layer.tensors.k;
    for (int t = block.first; t < block.last; ++t) {
      const std::size_t row = head + static_cast<std::size_t>(t);
      cache_.append(t, keys.data() + row * static_cast<std::size_t>(model_.head_dim),
                    layer_.layer.tensors.v.data() + row * static_cast<std::size_t>(model_.value_dim));
    }
    program_->append(cache_, moment(block), older);
  });
  if (layer_.full) {
    const std::size_t steps = layer_.result->step_token.size();
    layer_.result->slots[static_cast<std::size_t>(layer_.index * model_.kv_heads + kv_head_) * steps +
                         static_cast<std::size_t>(step)] = cache_.size();
  }
  const auto& all = layer_.settings.measured;
  const std::vector<int> measured(std::lower_bound(all.begin(), all.end(), block.first),
                                  std::lower_bound(all.begin(), all.end(), block.last));
  const bool observe = layer_.entry.observes && (block.phase == Phase::decode || traits_.observes_prompt);
  std::vector<int> rows = measured;
  if (observe) {
    rows.resize(static_cast<std::size_t>(block.last - block.first));
    std::iota(rows.begin(), rows.end(), block.first);
  }
  if (rows.empty()) return;
  const bool in_order = static_cast<int>(rows.size()) == block.last - block.first;
  const Attended attended = attend(rows, older, in_order, !measured.empty(), observe, TimedPhase::attend);
  if (layer_.full && !measured.empty()) measure(rows, measured, attended);
  if (observe)
    timed(TimedPhase::observe,
          [&] { program_->observe(cache_, moment(block), gather(static_cast<int>(rows.size()))); });
}

std::vector<float> HeadReplay::queries(const std::vector<int>& tokens) const {
  if (layer_.settings.positions == Positions::absolute)
    return gather_queries(model_, layer_.layer, layer_.layer.q_rotated, kv_head_, tokens);
  std::vector<float> rows = gather_queries(model_, layer_.layer, layer_.layer.tensors.q, kv_head_, tokens);
  const auto dim = static_cast<std::size_t>(model_.head_dim), group = static_cast<std::size_t>(group_);
  std::vector<float> unrotated(dim);
  for (std::size_t i = 0; i < tokens.size() * group; ++i) {  // a query sits at the newest slot that is not after it
    std::copy_n(rows.data() + i * dim, dim, unrotated.data());
    const int place = std::max(0, cache_.count_up_to(tokens[i / group]) - 1);
    layer_.layer.by_slot->rotate(static_cast<std::size_t>(place), unrotated.data(), rows.data() + i * dim);
  }
  return rows;
}

AttentionKeys HeadReplay::attention_keys() {
  AttentionKeys keys{cache_.keys(), cache_.values(), cache_.tokens().data(),
                     cache_.size(), model_.head_dim, model_.value_dim};
  if (layer_.settings.positions == Positions::absolute) return keys;
  const auto dim = static_cast<std::size_t>(model_.head_dim);
  slot_rotated_.resize(static_cast<std::size_t>(cache_.size()) * dim);
  slot_rotated_at_.resize(static_cast<std::size_t>(cache_.size()), -1);
  for (std::size_t s = 0; s < slot_rotated_at_.size(); ++s) {
    if (slot_rotated_at_[s] == cache_.rank()[s]) continue;
    slot_rotated_at_[s] = cache_.rank()[s];
    layer_.layer.by_slot->rotate(static_cast<std::size_t>(cache_.rank()[s]), cache_.keys() + s * dim,
                                 slot_rotated_.data() + s * dim);
  }
  keys.keys = slot_rotated_.data();
  return keys;
}

HeadReplay::Attended HeadReplay::attend(const std::vector<int>& tokens, int older, bool in_order, bool want_output,
                                        bool observe, TimedPhase phase) {
  Attended out;
  const auto rows = tokens.size() * static_cast<std::size_t>(group_);
  double observing = 0;  // counted as observe, not as attend
  const auto slots = static_cast<std::size_t>(cache_.size());
  if (observe) sums_.assign(slots * static_cast<std::size_t>(group_), 0.0);
  const auto weigh = [&](const AttentionTile& tile) {
    const auto start = std::chrono::steady_clock::now();
    for (int r = 0; r < tile.rows; ++r)
      for (int g = 0; g < group_; ++g) {
        const auto offset = static_cast<std::size_t>(r * group_ + g) * tile.stride;
        program_->weigh(tile.probability + offset, tile.logit + offset, tile.columns,
                        static_cast<int>(tokens.size()) - 1 - (tile.first_row + r),
                        sums_.data() + static_cast<std::size_t>(g) * slots);
      }
    observing += std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
  };
  timed(phase, [&] {
    const std::vector<float> q = queries(tokens);
    if (want_output) out.output.resize(rows * static_cast<std::size_t>(model_.value_dim)), out.lse.resize(rows);
    attention_.run(attention_keys(), rule_of(model_, layer_.layer, kv_head_),
                   {q.data(), tokens.data(), static_cast<int>(tokens.size()), group_}, in_order ? older : 0,
                   in_order ? older + 1 : cache_.size(), want_output ? out.output.data() : nullptr,
                   want_output ? out.lse.data() : nullptr, observe ? std::function(weigh) : nullptr);
  });
  times_[static_cast<std::size_t>(phase)] -= observing;
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
  return traits_.compresses && cache_.size() > layer_.settings.budget &&
         (block.phase == Phase::prompt || layer_.settings.compress == Compress::always);
}

Candidates HeadReplay::score(const BlockRange& block) {
  Observation seen;
  const bool frozen = traits_.window_once && block.phase == Phase::decode && counters_.compressions > 0;
  if (traits_.observation_window > 0 && !frozen) {
    std::vector<int> window(static_cast<std::size_t>(std::min(traits_.observation_window, block.last)));
    std::iota(window.begin(), window.end(), block.last - static_cast<int>(window.size()));
    attend(window, 0, false, false, true, TimedPhase::observe);  // the policy's own cost
    timed(TimedPhase::observe, [&] { seen = gather(static_cast<int>(window.size())); });
  }
  Candidates candidates;
  timed(TimedPhase::score, [&] {
    const auto size = static_cast<std::size_t>(cache_.size());
    constexpr float unscored = std::numeric_limits<float>::quiet_NaN();  // a hook that forgets a slot is found out
    std::vector<float> by_slot(size, unscored);
    std::vector<float> ordered(size);
    std::vector<int> tokens(size);
    program_->score(cache_, moment(block), seen, by_slot);
    for (std::size_t i = 0; i < size; ++i) {
      const auto slot = static_cast<std::size_t>(cache_.order()[i]);
      ordered[i] = by_slot[slot], tokens[i] = cache_.tokens()[slot];
      if (std::isnan(ordered[i]))
        throw InternalError(fmt::format("policy {} scored NaN: layer {}, KV head {}, slot {} (token {})",
                                        layer_.entry.doc.name, layer_.layer.info.index, kv_head_, slot, tokens[i]));
    }
    candidates = classify(ordered, tokens, layer_.settings.protect, block.last - 1);
  });
  return candidates;
}

std::vector<int> HeadReplay::victims(const Candidates& candidates, const std::vector<std::uint8_t>& kept) const {
  std::vector<std::size_t> going;  // in token order
  for (std::size_t i = 0; i < kept.size(); ++i)
    if (!kept[i]) going.push_back(i);
  if (traits_.one_at_a_time)
    std::sort(going.begin(), going.end(), [&](std::size_t a, std::size_t b) {
      const bool safe_a = candidates.safety[a] != Safety::normal, safe_b = candidates.safety[b] != Safety::normal;
      if (safe_a != safe_b) return safe_b;
      if (safe_a) return a < b;
      return candidates.score[a] != candidates.score[b] ? candidates.score[a] < candidates.score[b] : a > b;
    });
  std::vector<int> slots;
  for (const std::size_t i : going) slots.push_back(cache_.order()[i]);
  return slots;
}

void HeadReplay::compress(const BlockRange& block, const Candidates& candidates,
                          const std::vector<std::uint8_t>& kept) {
  timed(TimedPhase::compact, [&] {
    const std::vector<int> going = victims(candidates, kept);
    stays_.assign(static_cast<std::size_t>(cache_.size()), 1);
    for (const int slot : going) stays_[static_cast<std::size_t>(slot)] = 0;
    if (!layer_.entry.merges || !traits_.merges) {
      counters_.evictions += static_cast<std::int64_t>(going.size());
      drop(block, going);
    } else if (!traits_.one_at_a_time) {
      fold(block, going);
      drop(block, going);
    } else {
      std::vector<int> tokens;  // slots move when others go: tokens do not
      for (const int slot : going) tokens.push_back(cache_.tokens()[static_cast<std::size_t>(slot)]);
      for (const int token : tokens) {
        const std::vector<int> one{cache_.slot_of(token)};
        fold(block, one);
        drop(block, one);
      }
    }
    ++counters_.compressions;
  });
}

void HeadReplay::check_plan(const Fold& plan, int victim) const {
  const bool weighted = std::isfinite(plan.key) && std::isfinite(plan.value) && std::isfinite(plan.own_key) &&
                        std::isfinite(plan.own_value) && plan.own_key + plan.key != 0 &&
                        plan.own_value + plan.value != 0;
  if (plan.target < 0 || (plan.target != victim && plan.target < cache_.size() && weighted)) return;
  throw InternalError(
      fmt::format("policy {} planned a merge that cannot be: layer {}, KV head {}, victim {} into slot {} of {}, "
                  "weights key {} and {}, value {} and {}",
                  layer_.entry.doc.name, layer_.layer.info.index, kv_head_, victim, plan.target, cache_.size(),
                  plan.key, plan.own_key, plan.value, plan.own_value));
}

void HeadReplay::fold(const BlockRange& block, const std::vector<int>& going) {
  FoldSums sums(cache_);
  std::vector<std::pair<Fold, int>> folds;  // (plan, victim)
  for (const int victim : going) {          // every plan before any row changes
    const Fold plan = program_->merge(cache_, moment(block), stays_, victim);
    check_plan(plan, victim);
    const bool one =
        traits_.one_at_a_time;  // then the target is merely present: it may itself go later, and carry on what it got
    if (plan.target >= 0 && (one || stays_[static_cast<std::size_t>(plan.target)])) {
      sums.add(plan, victim);
      folds.emplace_back(plan, victim);
    } else {
      ++counters_.evictions;
      if (plan.target >= 0) counters_.lost_in_folds += cache_.multiplicities()[static_cast<std::size_t>(victim)];
    }
  }
  for (const int slot : sums.write(layer_.trace.dtype))
    if (static_cast<std::size_t>(slot) < slot_rotated_at_.size()) slot_rotated_at_[static_cast<std::size_t>(slot)] = -1;
  for (const auto& [plan, victim] : folds) {
    cache_.adopt(plan.target, victim);
    program_->fold(plan, victim);
  }
  counters_.merges += static_cast<std::int64_t>(folds.size());
}

void HeadReplay::drop(const BlockRange& block, std::vector<int> slots) {
  std::sort(slots.begin(), slots.end());
  for (const int slot : slots) program_->evict(cache_, moment(block), slot);
  cache_.remove(slots, [this](int from, int to) {
    program_->move(from, to);
    stays_[static_cast<std::size_t>(to)] = stays_[static_cast<std::size_t>(from)];
    if (static_cast<std::size_t>(to) < slot_rotated_at_.size()) slot_rotated_at_[static_cast<std::size_t>(to)] = -1;
  });
  program_->resize(cache_.size());
  slot_rotated_at_.resize(std::min(slot_rotated_at_.size(), static_cast<std::size_t>(cache_.size())));
}

}  // namespace kv
