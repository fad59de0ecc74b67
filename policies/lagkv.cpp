// LagKV: a token stays when its key and value stand out of the range of the next block of tokens. No queries are looked at
// (eviction-methods 3.14, kvpress's form).
#include "policies/policy.hpp"

namespace {

struct LagKV : kv::Policy {
  static constexpr kv::PolicyDoc doc{"lagkv", "LagKV", "Liang et al. 2025, arXiv:2504.04704",
                                     "keeps tokens whose keys and values vary most against the next block's range"};
  static constexpr kv::Published published{.compress = kv::Compress::prompt};
  int sinks = 4, lag = 128;
  void describe(auto& field) {
    field("sinks", sinks, kv::Range{0, 1 << 20}, "first tokens that stay");
    field("lag", lag, kv::Range{1, 1 << 20}, "tokens of a block; each is scored against the next");
  }
  struct Scratch {
    float key = 0, value = 0, score = 0;
  };

  KV_HD void on_compress(auto team, auto& head) const {
    const int n = head.size(), blocks = n < sinks + 2 * lag ? 0 : (n - sinks) / lag;
    const int scored = blocks > 1 ? (blocks - 1) * lag : 0;  // places after the sinks that have a next block
    team.for_each(n, [&](int s) {
      const int place = head.place(s) - sinks;
      if (place < 0 || place >= scored) return;
      const int next = sinks + (place / lag + 1) * lag;
      head.scratch(s).key = spread(head, next, head.info().key_dim, s, [&](int t) { return head.key(t); });
      head.scratch(s).value = spread(head, next, head.info().value_dim, s, [&](int t) { return head.value(t); });
    });
    team.sync();
    team.for_each(n, [&](int s) {
      const int place = head.place(s) - sinks;
      if (place < 0 || place >= scored) return;
      const auto softmax = [&](auto get) {
        const float mine = get(head.scratch(s));
        float sum = 0;
        for (int i = 0; i < lag; ++i) sum += kv::exp(get(head.scratch(mate(head, place, i))) - mine);
        return 1 / sum;
      };
      head.scratch(s).score = (softmax([](auto& x) { return x.key; }) + softmax([](auto& x) { return x.value; })) / 2;
    });
    team.sync();
    team.for_each(n, [&](int s) {
      const int place = head.place(s) - sinks;
      const float recency = static_cast<float>(place) / static_cast<float>(n - sinks > 0 ? n - sinks : 1);
      if (place < 0) {
        head.score(s) = kv::sink;
      } else if (place >= scored) {
        head.score(s) = blocks > 1 ? 1.f : recency;
      } else {
        int rank = 0;  // slots of the block that score lower, the newer of equals first
        for (int i = 0; i < lag; ++i) {
          const float less = head.scratch(s).score - head.scratch(mate(head, place, i)).score;
          rank += less > 0 || (less == 0 && i > place % lag);
        }
        head.score(s) = static_cast<float>(rank) / static_cast<float>(lag);
      }
    });
  }

 private:
  /// Member i of the block that the slot at `place` after the sinks belongs to.
  KV_HD int mate(auto& head, int place, int i) const { return head.at(sinks + place / lag * lag + i); }
  /// Standard deviation over channels of row(s), scaled to the range of the block that begins at place `next`.
  KV_HD float spread(auto& head, int next, int dim, int s, auto row) const {
    float sum = 0, squares = 0;
    for (int pass = 0; pass < 2; ++pass)  // the mean, then the deviations from it
      for (int c = 0; c < dim; ++c) {
        float low = row(head.at(next))[c], high = low;
        for (int i = 1; i < lag; ++i) {
          const float x = row(head.at(next + i))[c];
          low = x < low ? x : low, high = x > high ? x : high;
        }
        const float scaled = high > low ? (row(s)[c] - low) / (high - low) : 0.f;
        const float mean = sum / static_cast<float>(dim);
        (pass == 0 ? sum : squares) += pass == 0 ? scaled : (scaled - mean) * (scaled - mean);
      }
    return dim > 1 ? std::sqrt(squares / static_cast<float>(dim - 1)) : 0.f;
  }
};
KV_REGISTER(LagKV);

}  // namespace
