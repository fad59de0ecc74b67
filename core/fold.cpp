#include "core/fold.hpp"

#include <cmath>
#include <span>

#include "core/error.hpp"

namespace kv {
namespace {

void accumulate(std::vector<float>& sum, float& weight_sum, float weight, std::span<const float> row) {
  if (weight == 0) return;
  sum.resize(row.size());
  for (std::size_t c = 0; c < row.size(); ++c) sum[c] += weight * row[c];
  weight_sum += weight;
}

void write_row(float* row, const std::vector<float>& sum, float weight, float own, Dtype dtype) {
  const float divisor = own + weight;
  KV_CHECK(std::isfinite(divisor) && divisor != 0);
  for (std::size_t c = 0; c < sum.size(); ++c) row[c] = round_to(dtype, (own * row[c] + sum[c]) / divisor);
}

}  // namespace

void FoldSums::add(const Fold& plan, int victim) {
  const auto [entry, is_new] = targets_.try_emplace(plan.target);
  Target& target = entry->second;
  if (is_new) target.own_key = plan.own_key, target.own_value = plan.own_value;
  accumulate(target.key, target.key_weight, plan.key, {cache_.key(victim), static_cast<std::size_t>(cache_.key_dim())});
  accumulate(target.value, target.value_weight, plan.value,
             {cache_.value(victim), static_cast<std::size_t>(cache_.value_dim())});
}

std::vector<int> FoldSums::write(Dtype dtype) {
  std::vector<int> changed_keys;
  for (auto& [slot, target] : targets_) {
    if (!target.key.empty()) {
      write_row(cache_.key(slot), target.key, target.key_weight, target.own_key, dtype);
      changed_keys.push_back(slot);
    }
    if (!target.value.empty())
      write_row(cache_.value(slot), target.value, target.value_weight, target.own_value, dtype);
  }
  return changed_keys;
}

}  // namespace kv
