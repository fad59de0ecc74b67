#include "core/cache.hpp"

#include <algorithm>
#include <numeric>

#include "core/error.hpp"

namespace kv {

Cache::Cache(int key_dim, int value_dim, int tokens, int slot_limit)
    : key_dim_(key_dim),
      value_dim_(value_dim),
      slot_of_token_(static_cast<std::size_t>(tokens), -1),
      parent_(static_cast<std::size_t>(tokens), -1) {
  const auto slots = static_cast<std::size_t>(slot_limit);
  key_.reserve(slots * static_cast<std::size_t>(key_dim));
  value_.reserve(slots * static_cast<std::size_t>(value_dim));
  token_.reserve(slots), multiplicity_.reserve(slots), rank_.reserve(slots), order_.reserve(slots);
}

int Cache::standing_for(int token) const {
  int t = token;
  while (t >= 0 && parent_[static_cast<std::size_t>(t)] != t) t = parent_[static_cast<std::size_t>(t)];
  return t;
}

int Cache::count_up_to(int token) const {
  const auto after = std::upper_bound(order_.begin(), order_.end(), token,
                                      [this](int t, int slot) { return t < token_[static_cast<std::size_t>(slot)]; });
  return static_cast<int>(after - order_.begin());
}

void Cache::append(int token, const float* key, const float* value) {
  const int slot = size();
  key_.insert(key_.end(), key, key + key_dim_);
  value_.insert(value_.end(), value, value + value_dim_);
  token_.push_back(token);
  multiplicity_.push_back(1);
  rank_.push_back(slot);
  order_.push_back(slot);
  slot_of_token_[static_cast<std::size_t>(token)] = slot;
  parent_[static_cast<std::size_t>(token)] = token;
}

void Cache::adopt(int into, int from) {
  const auto i = static_cast<std::size_t>(into), f = static_cast<std::size_t>(from);
  multiplicity_[i] += multiplicity_[f];
  parent_[static_cast<std::size_t>(token_[f])] = token_[i];
}

void Cache::truncate(int size) {
  std::vector<int> newest(static_cast<std::size_t>(this->size() - size));
  std::iota(newest.begin(), newest.end(), size);
  remove(newest, [](int, int) { KV_CHECK(!"the newest slots are the last ones"); });
}

void Cache::remove(std::span<const int> victims, const std::function<void(int, int)>& moved) {
  KV_CHECK(std::is_sorted(victims.begin(), victims.end()));
  for (const int victim : victims) {
    const auto token = static_cast<std::size_t>(token_[static_cast<std::size_t>(victim)]);
    slot_of_token_[token] = -1;
    if (parent_[token] == static_cast<int>(token)) parent_[token] = -1;  // nobody adopted it: lost
    rank_[static_cast<std::size_t>(victim)] = -1;                        // marks the hole
  }
  std::erase_if(order_, [this](int slot) { return rank_[static_cast<std::size_t>(slot)] < 0; });
  for (auto victim = victims.rbegin(); victim != victims.rend();
       ++victim) {  // from the end: the last slot always stays
    const int last = size() - 1, hole = *victim;
    const auto l = static_cast<std::size_t>(last), h = static_cast<std::size_t>(hole);
    if (hole != last) {
      std::copy_n(key(last), key_dim_, key(hole));
      std::copy_n(value(last), value_dim_, value(hole));
      token_[h] = token_[l], multiplicity_[h] = multiplicity_[l];
      order_[static_cast<std::size_t>(
          std::lower_bound(order_.begin(), order_.end(), token_[l],
                           [&](int slot, int t) { return token_[static_cast<std::size_t>(slot)] < t; }) -
          order_.begin())] = hole;
      slot_of_token_[static_cast<std::size_t>(token_[h])] = hole;
      moved(last, hole);
    }
    token_.pop_back(), multiplicity_.pop_back(), rank_.pop_back();
    key_.resize(key_.size() - static_cast<std::size_t>(key_dim_));
    value_.resize(value_.size() - static_cast<std::size_t>(value_dim_));
  }
  for (std::size_t i = 0; i < order_.size(); ++i) rank_[static_cast<std::size_t>(order_[i])] = static_cast<int>(i);
}

}  // namespace kv
