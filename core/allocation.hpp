// How a budget is spread over layers and heads (eviction-methods 3.8 and 3.9, the forms whose sums are exact).
#pragma once
#include <span>
#include <vector>

#include "core/select.hpp"
#include "core/spec.hpp"

namespace kv {

/// Slots per KV head of each of `layers` layers, their mean exactly `budget`. uniform, adaptive: `budget` everywhere.
/// pyramid (PyramidKV, Cai et al. 2024, arXiv:2406.02069): all beyond the policy's `window` falls linearly from the
/// first layer to (budget - window) / beta in the last; no layer gets more than the `tokens` there are, or less than 1.
std::vector<int> layer_budgets(const Allocation& allocation, int budget, int window, int tokens, int layers);

/// adaptive (Ada-KV, Feng et al. 2024, arXiv:2407.11550): the slots of one layer's KV heads, sum = heads x budget. Each
/// head keeps its protected slots and its best int(floor * rest) others; what is left goes to the best scores of all
/// heads, of equals to the lower head, then the older slot. `heads` are the candidates of the first compression.
std::vector<int> head_budgets(const Allocation& allocation, int budget, std::span<const Candidates> heads);

}  // namespace kv
