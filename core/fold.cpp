#include "core/fold.hpp"

#include <algorithm>
#include <cmath>

#include "core/error.hpp"
#include "core/rounding.hpp"

namespace kv {
namespace {

void accumulate(std::vector<float>& sum, float weight, std::span<const float> row) {
  if (weight == 0) return;
  sum.resize(row.size());
  for (std::size_t c = 0; c < row.size(); ++c) sum[c] += weight * row[c];
}

void write_row(float* row, const std::vector<float>& sum, float own, float divisor, Dtype dtype) {
  KV_CHECK(std::isfinite(divisor) && divisor != 0);
  for (std::size_t c = 0; c < sum.size(); ++c) row[c] = round_to(dtype, (own * row[c] + sum[c]) / divisor);
}

bool outside(float weight) { return !(weight >= -1e-6f && weight <= 1 + 1e-6f); }

}  // namespace

FoldSums::Target& FoldSums::target(const Fold& plan, int victim) {
  const auto [entry, is_new] = targets_.try_emplace(plan.target);
  Target& target = entry->second;
  FoldTarget& sum = target.sum;
  if (is_new) {
    sum.own_key = plan.own_key, sum.own_value = plan.own_value;
    sum.multiplicity = cache_.multiplicities()[static_cast<std::size_t>(plan.target)];
    sum.key_divisor = sum.own_key, sum.value_divisor = sum.own_value;
  }
  ++sum.victims;
  sum.multiplicity += cache_.multiplicities()[static_cast<std::size_t>(victim)];
  sum.extra += plan.extra;
  sum.value += plan.value, sum.value_divisor += plan.value;
  accumulate(target.value, plan.value, {cache_.value(victim), static_cast<std::size_t>(cache_.value_dim())});
  return target;
}

void FoldSums::add(const Fold& plan, int victim) {
  Target& to = target(plan, victim);
  to.sum.key += plan.key, to.sum.key_divisor += plan.key;
  to.key_weights.push_back(plan.key);
  accumulate(to.key, plan.key, {cache_.key(victim), static_cast<std::size_t>(cache_.key_dim())});
}

void FoldSums::add(const Fold& plan, int victim, std::span<const float> key_weights,
                   std::span<const float> own_key_weights) {
  Target& to = target(plan, victim);
  const float* row = cache_.key(victim);
  to.own_channel.assign(own_key_weights.begin(), own_key_weights.end());
  to.key.resize(key_weights.size()), to.channel.resize(key_weights.size());
  for (std::size_t c = 0; c < key_weights.size(); ++c)
    to.key[c] += key_weights[c] * row[c], to.channel[c] += key_weights[c];
}

void FoldSums::adjust(const std::function<void(int, FoldTarget&)>& change) {
  for (auto& [slot, target] : targets_) change(slot, target.sum);
}

void FoldSums::write_key(int slot, const Target& target, Dtype dtype) {
  float* row = cache_.key(slot);
  if (target.channel.empty()) {
    const FoldTarget& sum = target.sum;
    write_row(row, target.key, sum.own_key, sum.key_divisor, dtype);
    const auto leaves = [&](float weight) { return outside(weight / sum.key_divisor); };
    if (leaves(sum.own_key) || std::any_of(target.key_weights.begin(), target.key_weights.end(), leaves))
      ++weights_outside_;
    return;
  }
  for (std::size_t c = 0; c < target.key.size(); ++c) {
    const float divisor = target.own_channel[c] + target.channel[c];
    KV_CHECK(std::isfinite(divisor) && divisor > 0);
    row[c] = round_to(dtype, (target.own_channel[c] * row[c] + target.key[c]) / divisor);
  }
}

std::vector<int> FoldSums::write(Dtype dtype) {
  std::vector<int> changed_keys;
  for (auto& [slot, target] : targets_) {
    const FoldTarget& sum = target.sum;
    // Without weight from any victim a row is what it was, unless on_target scales it.
    if (target.key.empty() && sum.own_key != sum.key_divisor) target.key.resize(std::size_t(cache_.key_dim()));
    if (target.value.empty() && sum.own_value != sum.value_divisor)
      target.value.resize(std::size_t(cache_.value_dim()));
    if (!target.key.empty()) write_key(slot, target, dtype), changed_keys.push_back(slot);
    if (target.value.empty()) continue;
    write_row(cache_.value(slot), target.value, sum.own_value, sum.value_divisor, dtype);
    unbalanced_ += !(std::abs(sum.own_value + sum.value - sum.value_divisor) <= 1e-5f * std::abs(sum.value_divisor));
  }
  return changed_keys;
}

}  // namespace kv
