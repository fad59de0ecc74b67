// TOVA, token omission via attention: drop the token that the last query attends to least. The newest token competes
// too.
#include "policies/policy.hpp"

namespace {

struct Tova : kv::Policy {
  static constexpr kv::PolicyDoc doc{"tova", "TOVA", "Oren et al. 2024, arXiv:2401.06104",
                                     "keeps what the last query attends to most"};
  enum class Share { layer, kv_head };
  Share share = Share::layer;
  void describe(auto& field) {
    field("share", share, kv::Choices{"layer", "kv_head"},
          "one kept set for all heads of a layer (as published), or one per KV head");
  }

  KV_HD kv::Traits traits() const {
    return {.scope = share == Share::layer ? kv::Scope::layer : kv::Scope::head, .observation_window = 1};
  }
  KV_HD float score(auto slot) const { return slot.seen().mean(); }
};
KV_REGISTER(Tova);

}  // namespace
