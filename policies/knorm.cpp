// Knorm: keys of small norm tend to receive much attention; drop the largest.
#include "policies/policy.hpp"

namespace {

struct Knorm : kv::Policy {
  static constexpr kv::PolicyDoc doc{"knorm", "Knorm", "Devoto et al. 2024, arXiv:2406.11430",
                                     "keeps the keys of smallest L2 norm"};
  struct Slot {
    float norm = 0;
  };

  KV_HD void on_append(auto row, auto& head, int slot) const {
    head.state(slot).norm = std::sqrt(row.dot(head.key(slot), head.key(slot)));
  }
  KV_HD float score(auto slot) const { return -slot.state.norm; }
};
KV_REGISTER(Knorm);

}  // namespace
