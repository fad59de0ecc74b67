// What hooks see: one slot, one row, one head. Plain pointers behind accessors, so that the same hook source runs in
// the CPU engine and inlined in kernels.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/policy.hpp"

#if defined(__CUDACC__)
#define KV_HD __host__ __device__
#else
#define KV_HD
#endif

namespace kv {

/// Scores above every other: such slots stay whatever the rest. When more are protected than fit, the lowest sinks stay
/// (all but one slot of the budget), then the newest protected slots.
inline constexpr float sink = INFINITY;
inline constexpr float protect = 3.402823466e38f;

/// Per query head of the group: the sum over query rows of weigh(probability), by default attention mass.
class Observed {
 public:
  KV_HD Observed(const float* sums, int rows, int group) : sums_(sums), rows_(rows), group_(group) {}
  KV_HD float operator[](int g) const { return sums_[g]; }
  KV_HD int group() const { return group_; }
  KV_HD int rows() const { return rows_; }  // how many query rows were summed
  KV_HD float mean() const {
    float sum = 0;
    for (int g = 0; g < group_; ++g) sum += sums_[g];
    return sum / static_cast<float>(group_);
  }
  KV_HD float max() const {
    float best = sums_[0];
    for (int g = 1; g < group_; ++g) best = sums_[g] > best ? sums_[g] : best;
    return best;
  }

 private:
  const float* sums_;
  int rows_, group_;
};

/// One slot, in a slot hook: its own data only, so hooks cannot race.
template <class State>
struct SlotView {
  State& state;  // the policy's Slot
  const HeadInfo& head;
  int token;                                                  // index in the sequence (never a RoPE position)
  int now;                                                    // token index of the newest slot
  int multiplicity;                                           // tokens it stands for
  float probe;                                                // key . head.vector(), with the trait key_probe
  KV_HD int age() const { return now - token; }               // 0 = just appended
  KV_HD bool recent(int n) const { return now - token < n; }  // among the newest n
  KV_HD int budget() const { return head.budget; }
};

/// One key or value as a row hook sees it: opaque, read through RowTeam.
struct Row {
  const float* data;
  int dim;
};

/// Who works on a row: a loop on the CPU, a warp on CUDA. All members must call together.
struct RowTeam {
  /// Sum of a[c] * b[c]: 8 channels in order, then a tree over the chunks; the same order on both engines.
  KV_HD float dot(Row a, Row b) const {
    float chunk[max_chunks] = {};
    const int chunks = (a.dim + 7) / 8;
    for (int c = 0; c < a.dim; ++c) chunk[(c / 8) % max_chunks] += a.data[c] * b.data[c];
    for (int n = chunks < max_chunks ? chunks : max_chunks; n > 1; n = (n + 1) / 2)
      for (int i = 0; i < n / 2; ++i) chunk[i] += chunk[i + (n + 1) / 2];
    return chunk[0];
  }
  /// vector += weight * row
  KV_HD void add(float* vector, float weight, Row row) const {
    for (int c = 0; c < row.dim; ++c) vector[c] += weight * row.data[c];
  }

 private:
  static constexpr int max_chunks = 32;
};

/// Who works on a head: a loop on the CPU, a thread block on CUDA. An index always meets the same member, so passes
/// over one's own slots need no sync(); reading another's does.
struct HostTeam {
  template <class F>
  KV_HD void for_each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
  /// Sum of f(i): 256 strided partial sums, then a tree; the same order on both engines.
  template <class F>
  KV_HD float sum(int n, F f) const {
    float partial[256] = {};
    for (int i = 0; i < n; ++i) partial[i % 256] += f(i);
    for (int half = 128; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) partial[i] += partial[i + half];
    return partial[0];
  }
  KV_HD void sync() const {}
};

// A hook that reads what its policy did not ask for is told so (on the CPU; kernels are compiled for the same policy).
#if defined(__CUDA_ARCH__)
#define KV_NEEDS(pointer, what) ((void)0)
#else
#define KV_NEEDS(pointer, what) ((pointer) != nullptr ? (void)0 : ::kv::hook_lacks(what))
#endif

/// One KV head: its slots 0 .. size()-1 in no particular order, linked in token order.
template <class State, class HeadState>
struct HeadView {
  const HeadInfo* info_ = nullptr;
  Moment moment_;
  int size_ = 0;
  const float *keys_ = nullptr, *values_ = nullptr;
  const int *token_ = nullptr, *multiplicity_ = nullptr, *order_ = nullptr, *rank_ = nullptr;
  State* state_ = nullptr;
  HeadState* head_state_ = nullptr;
  float *vector_ = nullptr, *probe_ = nullptr, *score_ = nullptr;
  Observation seen_;
  const std::uint8_t* kept_ = nullptr;

  KV_HD const HeadInfo& info() const { return *info_; }
  KV_HD int size() const { return size_; }
  KV_HD int budget() const { return info_->budget; }
  KV_HD int now() const { return moment_.now; }  // token index of the newest slot
  KV_HD Phase phase() const { return moment_.phase; }
  KV_HD int compressions() const { return moment_.compressions; }  // finished so far
  KV_HD int token(int s) const { return token_[s]; }
  KV_HD int age(int s) const { return moment_.now - token_[s]; }
  KV_HD int multiplicity(int s) const { return multiplicity_[s]; }
  /// The slot `k` places to the right of s in token order (left when negative), or -1 beyond the ends.
  KV_HD int neighbour(int s, int k) const {
    const int place = rank_[s] + k;
    return place >= 0 && place < size_ ? order_[place] : -1;
  }
  KV_HD int next(int s) const { return neighbour(s, 1); }
  KV_HD State& state(int s) const { return state_[s]; }
  KV_HD HeadState& shared() const { return *head_state_; }
  /// Rotated at its own position under positions `absolute`, unrotated otherwise.
  KV_HD Row key(int s) const { return {keys_ + static_cast<long>(s) * info_->key_dim, info_->key_dim}; }
  KV_HD Row value(int s) const { return {values_ + static_cast<long>(s) * info_->value_dim, info_->value_dim}; }
  /// The policy's own float[key_dim], with the trait key_probe.
  KV_HD float* vector() const { return KV_NEEDS(vector_, "head.vector() needs the trait key_probe"), vector_; }
  /// key(s) . vector() at this compression, with the trait key_probe.
  KV_HD float probe(int s) const {
    return KV_NEEDS(probe_, "head.probe() needs the trait key_probe, and is known while scoring only"), probe_[s];
  }
  /// The attention of the last queries, with the trait observation_window; while scoring only.
  KV_HD Observed seen(int s) const {
    KV_NEEDS(seen_.sums, "head.seen() needs the trait observation_window, and is known while scoring only");
    return {seen_.sums + static_cast<long>(s) * seen_.group, seen_.rows, seen_.group};
  }
  /// What on_compress writes.
  KV_HD float& score(int s) const { return KV_NEEDS(score_, "head.score() belongs to on_compress"), score_[s]; }
  /// Who stays, in on_merge.
  KV_HD bool kept(int s) const { return KV_NEEDS(kept_, "head.kept() is known in on_merge only"), kept_[s] != 0; }
};

/// The view of a cache, without a policy's own state.
template <class State, class HeadState>
HeadView<State, HeadState> view_of(const HeadInfo& info, const Moment& moment, const Cache& cache) {
  HeadView<State, HeadState> head;
  head.info_ = &info, head.moment_ = moment, head.size_ = cache.size();
  head.keys_ = cache.keys(), head.values_ = cache.values();
  head.token_ = cache.tokens().data(), head.multiplicity_ = cache.multiplicities().data();
  head.order_ = cache.order().data(), head.rank_ = cache.rank().data();
  return head;
}

}  // namespace kv
