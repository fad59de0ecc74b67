// HeadReplay's compressing half: scoring, and folding or dropping what does not stay.
#include <fmt/core.h>

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.hpp"
#include "core/head_replay.hpp"

namespace kv {

void HeadReplay::look_ahead() {
  if (statistics_) {
    const int next = layer_.trace.position[static_cast<std::size_t>(now_)] + 1;
    statistics_->look_ahead(next, traits_.future_queries.horizon);
    sight_.query_mean = statistics_->mean(), sight_.query_covariance = statistics_->covariance();
  }
  if (future_) {
    future_of_slot_.clear();
    for (const int token : cache_.tokens()) future_of_slot_.push_back(future_->of(token));
    sight_.future_mass = future_of_slot_.data();
  }
  if (layer_.norms)
    sight_.output_norm = layer_.norms->data() + static_cast<std::size_t>(kv_head_) * layer_.trace.position.size();
}

Candidates HeadReplay::score(const BlockRange& block) {
  const bool frozen = traits_.window_once && block.phase == Phase::decode && counters_.compressions > 0;
  if (traits_.observation_window > 0 && !frozen) {
    Look look{.phase = TimedPhase::observe, .observe = true, .window = true};  // the policy's own cost
    look.tokens.resize(static_cast<std::size_t>(std::min(traits_.observation_window, block.last)));
    std::iota(look.tokens.begin(), look.tokens.end(), block.last - static_cast<int>(look.tokens.size()));
    if (traits_.window_past) look.newest_key = look.tokens.front() - 1;
    attend(look);
    timed(TimedPhase::observe, [&] { sight_.seen = gather(static_cast<int>(look.tokens.size())); });
  }
  Candidates candidates;
  timed(TimedPhase::score, [&] {
    const auto size = static_cast<std::size_t>(cache_.size());
    constexpr float unscored = std::numeric_limits<float>::quiet_NaN();  // a hook that forgets a slot is found out
    std::vector<float> by_slot(size, unscored);
    std::vector<float> ordered(size);
    std::vector<int> tokens(size);
    look_ahead();
    program_->score(cache_, moment(), sight_, by_slot);
    for (std::size_t i = 0; i < size; ++i) {
      const auto slot = static_cast<std::size_t>(cache_.order()[i]);
      ordered[i] = by_slot[slot], tokens[i] = cache_.tokens()[slot];
      if (std::isnan(ordered[i]))
        throw InternalError(fmt::format("policy {} scored NaN: layer {}, KV head {}, slot {} (token {})",
                                        layer_.entry.doc.name, layer_.layer.info.index, kv_head_, slot, tokens[i]));
    }
    candidates = traits_.select == Select::links ? classify_links(ordered, tokens, layer_.settings.protect, now_)
                                                 : classify(ordered, tokens, layer_.settings.protect, now_);
  });
  return candidates;
}

void HeadReplay::find_targets(const std::vector<std::uint8_t>& kept) {
  const auto size = static_cast<std::size_t>(cache_.size());
  stays_.resize(size), target_.assign(size, -1);
  int last_kept = -1;
  for (std::size_t i = 0; i < size; ++i) {
    const int slot = cache_.order()[i];
    stays_[static_cast<std::size_t>(slot)] = kept[i];
    if (traits_.select == Select::links && !kept[i])
      target_[static_cast<std::size_t>(slot)] = traits_.picks == Picks::fold ? last_kept : cache_.order()[i - 1];
    if (kept[i]) last_kept = slot;
  }
  sight_.kept = stays_.data(), sight_.target = target_.data();
  if (traits_.nearest != Nearest::none) find_nearest();
}

void HeadReplay::find_nearest() {
  using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  constexpr std::size_t tile = 64;  // victims at a time
  std::vector<int> going, receiving;
  for (const int slot : cache_.order()) {
    if (!stays_[static_cast<std::size_t>(slot)])
      going.push_back(slot);
    else if (program_->receives(cache_, moment(), slot))
      receiving.push_back(slot);
  }
  similarity_.assign(static_cast<std::size_t>(cache_.size()), 0.f);
  sight_.similarity = similarity_.data();
  if (receiving.empty()) return;
  const auto rows_of = [&](const int* slots, std::size_t n) {
    Rows rows(static_cast<Eigen::Index>(n), model_.head_dim);
    for (std::size_t i = 0; i < n; ++i) {
      auto row = rows.row(static_cast<Eigen::Index>(i));
      row = Eigen::Map<const Eigen::RowVectorXf>(cache_.key(slots[i]), model_.head_dim);
      const float norm = row.norm();
      if (traits_.nearest == Nearest::cosine && norm > 0) row /= norm;
    }
    return rows;
  };
  const Rows candidates = rows_of(receiving.data(), receiving.size());
  for (std::size_t first = 0; first < going.size(); first += tile) {
    const std::size_t n = std::min(tile, going.size() - first);
    const Rows dots = rows_of(going.data() + first, n) * candidates.transpose();
    for (std::size_t i = 0; i < n; ++i) {
      Eigen::Index best = 0;
      for (Eigen::Index c = 1; c < dots.cols(); ++c)  // of equals the older
        if (dots(static_cast<Eigen::Index>(i), c) > dots(static_cast<Eigen::Index>(i), best)) best = c;
      const auto victim = static_cast<std::size_t>(going[first + i]);
      target_[victim] = receiving[static_cast<std::size_t>(best)];
      const float most = dots(static_cast<Eigen::Index>(i), best);
      similarity_[victim] = traits_.nearest == Nearest::cosine ? std::clamp(most, -1.f, 1.f) : most;
    }
  }
}

std::vector<int> HeadReplay::victims(const Candidates& candidates) const {
  std::vector<std::size_t> going;  // in token order
  for (std::size_t i = 0; i < candidates.size(); ++i)
    if (!stays_[static_cast<std::size_t>(cache_.order()[i])]) going.push_back(i);
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

void HeadReplay::compress(const Candidates& candidates, const std::vector<std::uint8_t>& kept) {
  timed(TimedPhase::compact, [&] {
    find_targets(kept);
    program_->selected(cache_, moment(), sight_);
    const std::vector<int> going = victims(candidates);
    if (!layer_.entry.merges || !traits_.merges) {
      counters_.evictions += static_cast<std::int64_t>(going.size());
      if (traits_.select == Select::links) count_as_if_merged(going);
      drop(going);
    } else if (!traits_.one_at_a_time) {
      fold(going);
      drop(going);
    } else {
      std::vector<int> tokens;  // slots move when others go: tokens do not
      for (const int slot : going) tokens.push_back(cache_.tokens()[static_cast<std::size_t>(slot)]);
      sight_ = {};  // the rest does not move with the slots
      sight_.kept = stays_.data();
      for (const int token : tokens) {
        const std::vector<int> one{cache_.slot_of(token)};
        fold(one);
        drop(one);
      }
    }
  });
}

bool HeadReplay::can_join(const Fold& plan) const {  // one at a time a target may go later, and carry on what it got
  return traits_.one_at_a_time || stays_[static_cast<std::size_t>(plan.target)] != 0;
}

void HeadReplay::check_plan(const Fold& plan, int victim) const {
  const bool weighted = std::isfinite(plan.key) && std::isfinite(plan.value) && std::isfinite(plan.own_key) &&
                        std::isfinite(plan.own_value) && std::isfinite(plan.extra) && plan.spread >= 1;
  if (plan.target < 0 || (plan.target != victim && plan.target < cache_.size() && weighted)) return;
  throw InternalError(
      fmt::format("policy {} planned a merge that cannot be: layer {}, KV head {}, victim {} into slot {} of {}, "
                  "weights key {} and {}, value {} and {}",
                  layer_.entry.doc.name, layer_.layer.info.index, kv_head_, victim, plan.target, cache_.size(),
                  plan.key, plan.own_key, plan.value, plan.own_value));
}

void HeadReplay::add_to(FoldSums& sums, const Fold& plan, int victim) {
  const std::size_t channels = layer_.entry.weighs_channels ? static_cast<std::size_t>(model_.head_dim) : 0;
  std::vector<float> weights(channels), own(channels);
  program_->key_weights(cache_, moment(), sight_, victim, weights);
  Fold part = plan;
  int left = plan.spread;
  for (int place = cache_.rank()[static_cast<std::size_t>(plan.target)]; left > 0 && place < cache_.size(); ++place) {
    part.target = cache_.order()[static_cast<std::size_t>(place)];
    if (!can_join(part) || part.target == victim) continue;
    --left;
    program_->key_weights(cache_, moment(), sight_, part.target, own);
    if (channels > 0)
      sums.add(part, victim, weights, own);
    else
      sums.add(part, victim);
  }
}

void HeadReplay::fold(const std::vector<int>& going) {
  FoldSums sums(cache_);
  std::vector<std::pair<Fold, int>> folds;  // (plan, victim)
  for (const int victim : going) {          // every plan before any row changes
    const Fold plan = program_->merge(cache_, moment(), sight_, victim);
    check_plan(plan, victim);
    if (plan.target >= 0 && can_join(plan)) {
      add_to(sums, plan, victim);
      folds.emplace_back(plan, victim);
      if (std::isfinite(plan.note)) counters_.notes.push_back(plan.note);
    } else {
      ++counters_.evictions;
      if (plan.target >= 0) counters_.lost_in_folds += cache_.multiplicities()[static_cast<std::size_t>(victim)];
    }
  }
  sums.adjust([&](int slot, FoldTarget& sum) { program_->target(cache_, moment(), sight_, slot, sum); });
  for (const int slot : sums.write(layer_.trace.dtype))
    if (static_cast<std::size_t>(slot) < slot_rotated_at_.size()) slot_rotated_at_[static_cast<std::size_t>(slot)] = -1;
  for (const auto& [plan, victim] : folds) {
    cache_.adopt(plan.target, victim);
    program_->fold(plan, victim);
  }
  for (const auto& [plan, victim] : folds) clip(plan.target);
  counters_.merges += static_cast<std::int64_t>(folds.size());
  counters_.weights_outside += sums.weights_outside(), counters_.unbalanced += sums.unbalanced();
  fold_bytes_ = std::max(fold_bytes_,
                         folds.size() * sizeof(float) * static_cast<std::size_t>(model_.head_dim + model_.value_dim));
}

void HeadReplay::count_as_if_merged(const std::vector<int>& going) {
  for (const int victim : going) {
    const int target = target_[static_cast<std::size_t>(victim)];
    if (target < 0 || !stays_[static_cast<std::size_t>(target)]) continue;
    cache_.set_multiplicity(target, cache_.multiplicities()[static_cast<std::size_t>(target)] +
                                        cache_.multiplicities()[static_cast<std::size_t>(victim)]);
    clip(target);
  }
}

void HeadReplay::clip(int slot) {
  const int beyond = cache_.multiplicities()[static_cast<std::size_t>(slot)] - traits_.clip;
  if (traits_.clip == 0 || beyond <= 0) return;
  cache_.set_multiplicity(slot, traits_.clip);
  counters_.lost_by_clip += beyond;
}

void HeadReplay::drop(std::vector<int> slots) {
  for (const int slot : slots) program_->evict(cache_, moment(), slot);  // in token order, as on every engine
  std::sort(slots.begin(), slots.end());
  cache_.remove(slots, [this](int from, int to) {
    program_->move(from, to);
    stays_[static_cast<std::size_t>(to)] = stays_[static_cast<std::size_t>(from)];
    if (static_cast<std::size_t>(to) < slot_rotated_at_.size()) slot_rotated_at_[static_cast<std::size_t>(to)] = -1;
  });
  program_->resize(cache_.size());
  slot_rotated_at_.resize(std::min(slot_rotated_at_.size(), static_cast<std::size_t>(cache_.size())));
}

}  // namespace kv
