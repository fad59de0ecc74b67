// LagKV: a token stays when its key and value stand out of the range of the next block of tokens. No queries are looked
// at (eviction-methods 3.14, kvpress's form).
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
    float key = 0, value = 0, score = 0, mean = 0;
  };

  KV_HD void on_compress(auto team, auto& head) const {
    const int n = head.size(), blocks = n < sinks + 2 * lag ? 0 : (n - sinks) / lag;
    const int scored = blocks > 1 ? (blocks - 1) * lag : 0;  // places after the sinks that have a next block
    team.for_each(scored / lag, [&](int b) {
      spread(
          head, b, head.info().key_dim, [&](int t) { return head.key(t); },
          [&](int t) -> float& { return head.scratch(t).key; });
      spread(
          head, b, head.info().value_dim, [&](int t) { return head.value(t); },
          [&](int t) -> float& { return head.scratch(t).value; });
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
  /// result(s) = standard deviation over channels of row(s), scaled to the range of the next block, for all of block b.
  KV_HD void spread(auto& head, int b, int dim, auto row, auto result) const {
    const auto member = [&](int block, int i) { return head.at(sinks + block * lag + i); };
    for (int i = 0; i < lag; ++i) result(member(b, i)) = 0, head.scratch(member(b, i)).mean = 0;
    for (int c = 0; c < dim; ++c) {
      float low = row(member(b + 1, 0))[c], high = low;
      for (int i = 1; i < lag; ++i) {
        const float x = row(member(b + 1, i))[c];
        low = x < low ? x : low, high = x > high ? x : high;
      }
      for (int i = 0; i < lag; ++i) {  // Welford's running mean and sum of squares
        const int s = member(b, i);
        const float x = high > low ? (row(s)[c] - low) / (high - low) : 0.f, before = x - head.scratch(s).mean;
        head.scratch(s).mean += before / static_cast<float>(c + 1);
        result(s) += before * (x - head.scratch(s).mean);
      }
    }
    for (int i = 0; i < lag && dim > 1; ++i) {
      float& squares = result(member(b, i));
      squares = std::sqrt(squares / static_cast<float>(dim - 1));
    }
  }
};
KV_REGISTER(LagKV);

}  // namespace
