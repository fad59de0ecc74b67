// The reference that peeks: what full attention will still look at, known only because the trace holds the future.
#include "policies/policy.hpp"

namespace {

struct OracleMass : kv::Policy {
  static constexpr kv::PolicyDoc doc{"oracle_mass", "Oracle (future mass)", "reference",
                                     "keeps the slots that receive most full attention from the queries to come"};

  KV_HD kv::Traits traits() const { return {.future_mass = true}; }
  KV_HD float score_in(auto& head, int slot) const { return head.future_mass(slot); }
};
KV_REGISTER(OracleMass);

}  // namespace
