// StreamingLLM: attention sinks and a recent window. Published with keys re-positioned by their place in the cache.
#include "policies/policy.hpp"

namespace {

struct StreamingLlm : kv::Policy {
  static constexpr kv::PolicyDoc doc{"streaming_llm", "StreamingLLM", "Xiao et al. 2023, arXiv:2309.17453",
                                     "keeps the first tokens (sinks) and the newest"};
  static constexpr kv::Published published{.positions = kv::Positions::cache};
  int sinks = 4;
  void describe(auto& field) { field("sinks", sinks, kv::Range{0, 1 << 20}, "first tokens that always stay"); }

  KV_HD float score(auto slot) const {
    if (slot.token < sinks) return kv::sink;
    const int recent = slot.budget() > sinks ? slot.budget() - sinks : 1;  // the newest token always has a place
    return slot.recent(recent) ? kv::protect : static_cast<float>(slot.token);
  }
};
KV_REGISTER(StreamingLlm);

}  // namespace
