// The control of KVSlimmer and AsymKV: the same links and values, but every merged key is the plain mean.
#include "policies/adjacent_links.hpp"

namespace {

struct MeanMerge : kv::AdjacentLinks {
  static constexpr kv::PolicyDoc doc{"mean_merge", "Mean merge", "control of KVSlimmer and AsymKV",
                                     "joins the adjacent slots that the next block needs least; keys are plain means"};
  void describe(auto& field) { describe_links(field); }

  KV_HD kv::Traits traits() const { return link_traits(); }
  KV_HD kv::Fold on_merge(auto& head, int victim) const {
    kv::Fold plan = link_fold(head, victim);
    plan.key = 1;
    return plan;
  }
};
KV_REGISTER(MeanMerge);

}  // namespace
