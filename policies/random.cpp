// Random: the baseline below which a score knows nothing. Each token draws once, so the kept set at any budget is a
// uniform subset and shrinks consistently, whatever the block size.
#include "policies/policy.hpp"

namespace {

struct Random : kv::Policy {
  static constexpr kv::PolicyDoc doc{"random", "Random", "-", "keeps a uniformly random subset"};
  KV_HD float score(auto slot) const {
    return kv::uniform(slot.head.seed, slot.head.layer, slot.head.kv_head, slot.token);
  }
};
KV_REGISTER(Random);

}  // namespace
