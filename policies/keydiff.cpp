// KeyDiff: keys that point away from the mean direction of the cache are distinctive; drop the most typical. Zero keys
// count as typical of nothing (cosine 0).
#include "policies/policy.hpp"

namespace {

struct KeyDiff : kv::Policy {
  static constexpr kv::PolicyDoc doc{"keydiff", "KeyDiff", "Park et al. 2025, arXiv:2504.15364",
                                     "keeps the keys least similar to the mean key direction"};
  struct Slot {
    float inverse_norm = 0;
  };

  KV_HD kv::Traits traits() const { return {.key_probe = true}; }  // vector() is the sum of the unit keys in the cache
  KV_HD void on_append(auto row, auto& head, int slot) const {
    const float norm = std::sqrt(row.dot(head.key(slot), head.key(slot)));
    head.state(slot).inverse_norm = norm > 0 ? 1 / norm : 0.f;
    row.add(head.vector(), head.state(slot).inverse_norm, head.key(slot));
  }
  KV_HD void on_evict(auto row, auto& head, int slot) const {
    row.add(head.vector(), -head.state(slot).inverse_norm, head.key(slot));
  }
  KV_HD float score(auto slot) const {
    return -slot.probe * slot.state.inverse_norm;
  }  // the anchor's norm is common to all
};
KV_REGISTER(KeyDiff);

}  // namespace
