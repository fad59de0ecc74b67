// Expected Attention: the queries so far, taken as Gaussian and rotated to the positions to come, say how much
// attention a key can expect; times the norm of its value (eviction-methods 3.12).
#include "policies/policy.hpp"

namespace {

struct ExpectedAttention : kv::Policy {
  static constexpr kv::PolicyDoc doc{"expected_attention", "Expected Attention", "Devoto et al. 2025, arXiv:2510.00636",
                                     "keeps what Gaussian queries at the next positions would attend to"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  int sinks = 4, future = 512;
  bool covariance = true, value_norm = true;
  double epsilon = 0;
  void describe(auto& field) {
    field("sinks", sinks, kv::Range{0, 1 << 20},
          "first tokens that stay; their queries are left out of the statistics");
    field("future", future, kv::Range{1, 1 << 14}, "positions to come that the rotation is averaged over");
    field("covariance", covariance, "use the queries' covariance, not their mean alone");
    field("value_norm", value_norm, "weigh by the norm of the value");
    field("epsilon", epsilon, kv::Range{0, 1}, "added to the probability before that");
  }
  struct Scratch {
    float logit = 0, probability = 0;
  };

  KV_HD kv::Traits traits() const { return {.future_queries = {sinks, future}}; }
  KV_HD void on_compress(auto team, auto& head) const {
    const int n = head.size(), group = head.info().group;
    team.for_each(n, [&](int s) { head.scratch(s).probability = 0; });
    for (int g = 0; g < group; ++g) {
      team.for_each(n,
                    [&](int s) { head.scratch(s).logit = head.token(s) < sinks ? -INFINITY : expected(head, s, g); });
      team.sync();
      const float most = team.max(n, [&](int s) { return head.scratch(s).logit; });
      const float sum = team.sum(n, [&](int i) { return kv::exp(head.scratch(head.at(i)).logit - most); });
      team.for_each(n, [&](int s) {
        head.scratch(s).probability += kv::exp(head.scratch(s).logit - most) / sum / static_cast<float>(group);
      });
    }
    team.for_each(n, [&](int s) {
      const float norm = value_norm ? std::sqrt(kv::RowTeam{}.dot(head.value(s), head.value(s))) : 1.f;
      const float p = head.scratch(s).probability + static_cast<float>(epsilon);
      head.score(s) = head.token(s) < sinks ? kv::sink : p * norm;
    });
  }

 private:
  /// log E exp(scale q.k) for Gaussian q.
  KV_HD float expected(auto& head, int s, int g) const {
    const int d = head.info().key_dim;
    const kv::RowTeam row{};
    const float scale = head.info().scale, mean = scale * row.dot(head.key(s), {head.query_mean(g), d});
    if (!covariance) return mean;
    float variance = 0;
    for (int c = 0; c < d; ++c)
      variance += head.key(s)[c] * row.dot(head.key(s), {head.query_covariance(g) + c * d, d});
    return mean + scale * scale * variance / 2;
  }
};
KV_REGISTER(ExpectedAttention);

}  // namespace
