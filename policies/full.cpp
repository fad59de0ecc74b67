// Full cache: nothing ever leaves. The reference of every error, and its cost.
#include "policies/policy.hpp"

namespace {

struct Full : kv::Policy {
  static constexpr kv::PolicyDoc doc{"full", "Full cache", "-", "keeps every token"};
  KV_HD kv::Traits traits() const { return {.compresses = false}; }
  KV_HD float score(auto) const { return kv::protect; }
};
KV_REGISTER(Full);

}  // namespace
